from optforge import rule, sqrt


@rule
def adadelta(p, g, acc=0.0, acc_delta=0.0, *, lr=1.0, rho=0.95, eps=1e-6):
    """AdaDelta: steps scaled by the ratio of recent updates to recent gradients.

    acc ← rho·acc + (1 − rho)·g²;  u = g·√(acc_delta + eps) / √(acc + eps);  p ← p − lr·u;
    acc_delta ← rho·acc_delta + (1 − rho)·u²

    lr: learning rate, usually 1. rho: decay of both averages. eps: keeps the roots away from 0.

    Zeiler, "ADADELTA: An Adaptive Learning Rate Method", arXiv:1212.5701, 2012.
    """
    assert 0 <= rho < 1 and eps > 0
    acc = rho * acc + (1 - rho) * g**2
    u = g * sqrt(acc_delta + eps) / sqrt(acc + eps)
    p = p - lr * u
    acc_delta = rho * acc_delta + (1 - rho) * u**2
    return p, acc, acc_delta
