from optforge import transform


@transform
def add_weight_decay(p, g, *, weight_decay=0.01):
    """Add the decayed parameter to the gradient, which is L2 regularisation.

    g ← g + weight_decay·p

    weight_decay: share of the parameter that is added.
    """
    assert weight_decay >= 0
    g = g + weight_decay * p
    return g
