from optforge import norm, transform


@transform
def clip_by_norm(g, *, max_norm=1.0):
    """Scale the gradient of each tensor down where its own norm reaches a bound.

    n = √(Σ g² over the tensor);  g ← g·(max_norm / n) where n ≥ max_norm, else g stays untouched

    max_norm: the bound. The factor is computed once per tensor, in double.
    """
    assert max_norm > 0
    own_norm = norm(g)
    g = g * (max_norm / own_norm) if own_norm >= max_norm else g
    return g
