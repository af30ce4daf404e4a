from optforge import norm, rule, scalar, sqrt


@rule
def novograd(p, g, m=0.0, v: scalar = 0.0, *, lr=0.01, beta1=0.95, beta2=0.98, eps=1e-8, weight_decay=0.001):
    """NovoGrad: normalised gradients, a moment for each tensor, momentum, decoupled weight decay.

    v ← beta2·v + (1 − beta2)·‖g‖², at first ‖g‖²;
    m ← beta1·m + (g / (√v + eps) + weight_decay·p);  p ← p − lr·m

    lr: learning rate. beta1, beta2: decay of the first moment, and of the second, which is one number per
    tensor. eps: added to its root. weight_decay: share of the parameter in the first moment.

    Ginsburg et al., "Stochastic Gradient Methods with Layer-wise Adaptive Moments for Training of Deep
    Networks", 2019.
    """
    assert 0 <= beta1 < 1 and 0 <= beta2 < 1 and eps >= 0 and weight_decay >= 0
    g_norm = norm(g)
    squares = g_norm**2
    v = squares if v == 0 else beta2 * v + (1 - beta2) * squares
    m = beta1 * m + (g / (sqrt(v) + eps) + weight_decay * p)
    p = p - lr * m
    return p, m, v
