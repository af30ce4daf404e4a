from optforge import rule


@rule
def nesterov(p, g, m=0.0, *, lr=0.01, momentum=0.9):
    """Nesterov's accelerated gradient, with the gradient taken at the parameter itself.

    m ← momentum·m − lr·g;  p ← p + momentum·m − lr·g

    lr: learning rate. momentum: share of the velocity that is kept, usually 0.5 to 0.9.

    Nesterov, "A method for solving the convex programming problem with convergence rate O(1/k²)", Soviet
    Mathematics Doklady 27, 1983; in the form of Bengio, Boulanger-Lewandowski and Pascanu, "Advances in
    Optimizing Recurrent Networks", ICASSP 2013.
    """
    assert 0 <= momentum < 1
    v = momentum * m - lr * g
    m = v
    p = p + momentum * v - lr * g
    return p, m
