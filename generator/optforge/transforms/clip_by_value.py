from optforge import maximum, minimum, transform


@transform
def clip_by_value(g, *, max_value=1.0):
    """Bound the absolute value of each element of the gradient.

    g ← min(max(g, −max_value), max_value); NaN stays

    max_value: the bound.
    """
    assert max_value > 0
    g = minimum(maximum(g, -max_value), max_value)
    return g
