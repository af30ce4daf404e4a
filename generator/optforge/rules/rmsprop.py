from optforge import rule, sqrt


@rule
def rmsprop(p, g, acc=0.0, *, lr=1e-3, rho=0.9, eps=1e-6):
    """RMSProp: the gradient divided by the root of its recent mean square.

    acc ← rho·acc + (1 − rho)·g²;  p ← p − lr·(g / √(acc + eps))

    lr: learning rate. rho: decay of the mean square. eps: keeps the root away from 0.

    Tieleman and Hinton, "Lecture 6.5: rmsprop", COURSERA: Neural Networks for Machine Learning, 2012.
    """
    assert 0 <= rho < 1 and eps > 0
    acc = rho * acc + (1 - rho) * g**2
    p = p - lr * (g / sqrt(acc + eps))
    return p, acc
