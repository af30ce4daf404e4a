from optforge import rule, sqrt


@rule
def adam(p, g, m=0.0, v=0.0, *, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-6, lam=1 - 1e-8):
    """Adam with a decaying first-moment rate.

    beta1_t = beta1·lam^(t−1);  m ← beta1_t·m + (1 − beta1_t)·g;  v ← beta2·v + (1 − beta2)·g²;
    p ← p − (lr·m / (1 − beta1^t)) / (√(v / (1 − beta2^t)) + eps)

    lr: learning rate. beta1, beta2: decay of the first and second moment. eps: added to the root of the
    corrected second moment. lam: decay of beta1.

    Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015.
    """
    assert 0 <= beta1 < 1 and 0 <= beta2 < 1 and eps > 0
    beta1_t = beta1 * lam ** (t - 1)
    m = beta1_t * m + (1 - beta1_t) * g
    v = beta2 * v + (1 - beta2) * g**2
    p = p - (lr * m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)
    return p, m, v
