from optforge import rule


@rule
def momentum(p, g, m=0.0, *, lr=0.01, momentum=0.9):
    """Gradient descent with momentum; the learning rate is part of the velocity.

    m ← momentum·m − lr·g;  p ← p + m

    lr: learning rate. momentum: share of the velocity that is kept, usually 0.5 to 0.9.

    Polyak, "Some methods of speeding up the convergence of iteration methods", USSR Computational Mathematics
    and Mathematical Physics 4, 1964.
    """
    assert 0 <= momentum < 1
    v = momentum * m - lr * g
    m = v
    p = p + v
    return p, m
