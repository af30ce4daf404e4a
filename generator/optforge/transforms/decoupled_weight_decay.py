from optforge import transform


@transform
def decoupled_weight_decay(p, *, lr, weight_decay=0.01):
    """Shrink the parameter itself, before the step and apart from the gradient.

    p ← p·(1 − lr·weight_decay)

    lr: the rule's. weight_decay: share of the parameter, times lr, that is taken away.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
    """
    assert weight_decay >= 0
    p = p * (1 - lr * weight_decay)
    return p
