from optforge import rule, sqrt


@rule
def flat_adamw(
    p, g, m=0.0, v=0.0, *, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, decay=0.01, correction1=0.1, correction2=0.001
):
    """AdamW as `model_update` has it; the corrections are 1 - beta**t, computed as the trainer does, in float."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    p = p - lr * (m / correction1 / (sqrt(v / correction2) + eps) + decay * p)
    return p, m, v
