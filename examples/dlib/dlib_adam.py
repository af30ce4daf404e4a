from optforge import rule, sqrt


@rule
def dlib_step(p, g, m=0.0, v=0.0, w=0.0, *, alpha=1e-3, momentum1=0.9, momentum2=0.999, weight_decay=5e-4, eps=1e-8):
    """dlib::adam, whose result is a step: p is what it returns, and w are the parameters, which it only reads."""
    g = weight_decay * w + g
    m = momentum1 * m + (1 - momentum1) * g
    v = momentum2 * v + (1 - momentum2) * g * g
    p = -alpha * m / (sqrt(v) + eps)
    return p, m, v, w


@rule
def dlib_adam(p, g, m=0.0, v=0.0, *, alpha=1e-3, momentum1=0.9, momentum2=0.999, weight_decay=5e-4, eps=1e-8):
    """The same as rules are usually written: p are the parameters, and the step is the kernel's delta."""
    g = weight_decay * p + g
    m = momentum1 * m + (1 - momentum1) * g
    v = momentum2 * v + (1 - momentum2) * g * g
    p = p - alpha * m / (sqrt(v) + eps)
    return p, m, v
