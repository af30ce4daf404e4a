from optforge import rule, sqrt


@rule
def tiny_adam(p, g, m=0.0, v=0.0, *, alpha=1e-3, b1=0.9, b2=0.999, b1_t=0.9, b2_t=0.999, eps=1e-8):
    """tiny_dnn::adam: eps under the root, and powers of b1 and b2 that the engine multiplies up in float."""
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    p = p - alpha * (m / (1 - b1_t)) / sqrt(v / (1 - b2_t) + eps)
    return p, m, v
