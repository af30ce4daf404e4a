from optforge import rule, sqrt


@rule
def adagrad(p, g, acc=0.0, *, lr=0.01, eps=1e-6):
    """Adagrad: each element's rate falls with the squares of its gradients.

    acc ← acc + g²;  p ← p − (lr / √(acc + eps))·g

    lr: learning rate. eps: keeps the root away from 0.

    Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization", JMLR 12, 2011.
    """
    assert eps > 0
    acc = acc + g**2
    p = p - (lr / sqrt(acc + eps)) * g
    return p, acc
