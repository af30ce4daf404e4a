from optforge import rule


@rule
def sgd(p, g, *, lr=0.01):
    """Stochastic gradient descent.

    p ← p − lr·g

    lr: learning rate.

    Robbins and Monro, "A Stochastic Approximation Method", Annals of Mathematical Statistics 22, 1951.
    """
    p = p - lr * g
    return p
