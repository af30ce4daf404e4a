from optforge import rule, sqrt


@rule
def rms_decay(p, g, v=0.0, *, t, lr=1e-3, rho=0.99, eps=1e-8, decay=0.1):
    """RMSProp with a corrected average and a rate that falls with time."""
    assert 0 <= rho < 1 and eps > 0
    rate = lr / (1 + decay * (t - 1))
    v = rho * v + (1 - rho) * g**2
    p = p - rate * g / (sqrt(v / (1 - rho**t)) + eps)
    return p, v
