from optforge import rule, sqrt


@rule
def adamw(p, g, m=0.0, v=0.0, *, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    """Adam with decoupled weight decay, in PyTorch's form: the decay comes before the step.

    p ← p·(1 − lr·weight_decay);  m ← beta1·m + (1 − beta1)·g;  v ← beta2·v + (1 − beta2)·g²;
    p ← p − (lr / (1 − beta1^t))·m / (√(v / (1 − beta2^t)) + eps)

    lr: learning rate. beta1, beta2: decay of the first and second moment. eps: added to the root of the
    corrected second moment. weight_decay: share of the parameter, times lr, that is taken away.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
    """
    assert 0 <= beta1 < 1 and 0 <= beta2 < 1 and eps >= 0 and weight_decay >= 0
    p = p * (1 - lr * weight_decay)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    step_size = lr / (1 - beta1**t)
    p = p - step_size * m / (sqrt(v / (1 - beta2**t)) + eps)
    return p, m, v
