from optforge import global_norm, minimum, transform


@transform
def clip_by_global_norm(g, *, max_norm=50.0, form="threshold"):
    """Scale all gradients down where their norm together reaches a bound.

    n = √(Σ g² over all tensors);  g ← g·(max_norm / n) where n ≥ max_norm, else g stays untouched

    max_norm: the bound. form: "threshold" as above; "pytorch" always multiplies by min(1, max_norm / (n + 1e-6)),
    "lasagne" by min(n, max_norm) / (n + 1e-7). The factor is computed once, in double.

    Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", ICML 2013.
    """
    assert max_norm > 0
    all_norm = global_norm(g)
    if form == "pytorch":
        g = g * minimum(1, max_norm / (all_norm + 1e-6))
    elif form == "lasagne":
        g = g * (minimum(all_norm, max_norm) / (all_norm + 1e-7))
    else:
        g = g * (max_norm / all_norm) if all_norm >= max_norm else g
    return g
