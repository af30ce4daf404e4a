from optforge import rule, sqrt


@rule
def graph_adamw(p, g, m=0.0, v=0.0, *, alpha=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, keep=1.0, beta1h=10.0, beta2h=1e3):
    """AdamW as the node of the graph has it, which is told keep = 1 - alpha * wd and both 1 / (1 - beta**t)."""
    m = m * beta1 + g * (1 - beta1)
    v = v * beta2 + g * g * (1 - beta2)
    p = p * keep - alpha * (m * beta1h) / (sqrt(v * beta2h) + eps)
    return p, m, v
