from optforge import norm, rule


@rule
def lars(p, g, m=0.0, *, lr=0.1, momentum=0.9, weight_decay=5e-4, trust_coefficient=1e-3):
    """LARS: momentum with a learning rate for each tensor, from the norms of parameter and gradient.

    r = trust_coefficient·‖p‖ / (‖g‖ + weight_decay·‖p‖), or 1 if either norm is 0;
    m ← momentum·m + lr·r·(g + weight_decay·p);  p ← p − m

    lr: global learning rate. momentum: decay of the velocity. weight_decay: share of the parameter in the
    gradient. trust_coefficient: how far a tensor may move, as a share of its norm.

    You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks", 2017.
    """
    assert 0 <= momentum < 1 and weight_decay >= 0 and trust_coefficient > 0
    p_norm = norm(p)
    g_norm = norm(g)
    decayed_norm = g_norm + weight_decay * p_norm
    local_rate = trust_coefficient * p_norm / decayed_norm if p_norm > 0 and g_norm > 0 else 1
    m = momentum * m + lr * local_rate * (g + weight_decay * p)
    p = p - m
    return p, m
