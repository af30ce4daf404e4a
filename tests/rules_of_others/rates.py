"""Rules that find their rate themselves, by sums over all tensors."""

from optforge import abs, global_norm, global_sum, maximum, minimum, norm, rule, scalar, sqrt


@rule
def prodigy(p, g, p0="p", exp_avg=0.0, exp_avg_sq=0.0, s=0.0, d: scalar = "d0", d_max: scalar = "d0",
            d_numerator: scalar = 0.0, *, t, lr=1.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, d0=1e-6,
            d_coef=1.0, growth_rate=1e300, use_bias_correction=False, safeguard_warmup=False, decouple=True):  # fmt: skip
    """Prodigy: d grows with ⟨g, x0 − x⟩ over ‖s‖₁, both of all tensors (Mishchenko and Defazio, ICML 2024)."""
    assert d0 > 0 and lr >= 0 and eps > 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1 and growth_rate > 1
    beta3 = sqrt(beta2)
    bias_correction = sqrt(1 - beta2**t) / (1 - beta1**t) if use_bias_correction else 1
    dlr = d * lr * bias_correction
    if not decouple:
        g = g + weight_decay * p
    d_numerator = beta3 * d_numerator + d / d0 * dlr * global_sum(g * (p0 - p))
    exp_avg = beta1 * exp_avg + d * (1 - beta1) * g
    exp_avg_sq = beta2 * exp_avg_sq + d * d * (1 - beta2) * g * g
    s = beta3 * s + d / d0 * (d if safeguard_warmup else dlr) * g
    d_denom = global_sum(abs(s))
    d_hat = d_coef * d_numerator / d_denom if d_denom != 0 else d
    d = maximum(d, d_hat) if d == d0 else d
    d_max = maximum(d_max, d_hat)
    d = minimum(d_max, d * growth_rate)
    denom = sqrt(exp_avg_sq) + d * eps
    if decouple:
        p = p - weight_decay * dlr * p
    p = p - dlr * exp_avg / denom
    return p, p0, exp_avg, exp_avg_sq, s, d, d_max, d_numerator


@rule
def dadapt_adam(p, g, exp_avg=0.0, exp_avg_sq=0.0, s=0.0, d: scalar = "d0", numerator_weighted: scalar = 0.0, *, t,
                lr=1.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, d0=1e-6, growth_rate=1e300,
                use_bias_correction=False, decouple=False):  # fmt: skip
    """DAdaptAdam: a lower bound of the distance to the solution for its rate (Defazio and Mishchenko, ICML 2023)."""
    assert d0 > 0 and lr >= 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1
    sqrt_beta2 = beta2**0.5
    bias_correction = (1 - beta2**t) ** 0.5 / (1 - beta1**t) if use_bias_correction else 1
    dlr = d * lr * bias_correction
    if not decouple:
        g = g + weight_decay * p
    denom = sqrt(exp_avg_sq) + eps
    numerator_acc = dlr * global_sum(g * (s / denom))
    exp_avg = beta1 * exp_avg + dlr * (1 - beta1) * g
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g * g
    s = sqrt_beta2 * s + dlr * (1 - sqrt_beta2) * g
    sk_l1 = global_sum(abs(s))
    numerator_weighted = sqrt_beta2 * numerator_weighted + (1 - sqrt_beta2) * numerator_acc
    d_hat = numerator_weighted / ((1 - sqrt_beta2) * sk_l1) if sk_l1 > 0 else d
    d = maximum(d, minimum(d_hat, d * growth_rate))
    denom = sqrt(exp_avg_sq) + eps
    if decouple:
        p = p * (1 - weight_decay * dlr)
    p = p - exp_avg / denom
    return p, exp_avg, exp_avg_sq, s, d, numerator_weighted


@rule
def dadapt_sgd(p, g, x0="p", s=0.0, d: scalar = "d0", numerator_weighted: scalar = 0.0, g0_norm: scalar = 0.0, *,
               lr=1.0, momentum=0.9, weight_decay=0.0, d0=1e-6, growth_rate=1e300):  # fmt: skip
    """DAdaptSGD: dual averaging, in units of the first gradient's norm (Defazio and Mishchenko, ICML 2023)."""
    assert d0 > 0 and lr >= 0 and 0 <= momentum < 1
    g0_norm = global_norm(g) if g0_norm == 0 else g0_norm
    dlr = d * lr / g0_norm if g0_norm > 0 else 0.0
    g = g + weight_decay * p
    numerator_weighted = numerator_weighted + dlr * global_sum(g * s)
    s = s + dlr * g
    sk_norm = global_norm(s)
    d_hat = 2 * numerator_weighted / sk_norm if sk_norm > 0 else d
    d = maximum(d, minimum(d_hat, d * growth_rate))
    z = x0 - s
    p = momentum * p + (1 - momentum) * z
    return p, x0, s, d, numerator_weighted, g0_norm


@rule
def dog(p, g, p0="p", averaged="p", rbar: scalar = 0.0, G: scalar = 0.0, *, t, lr=1.0, reps_rel=1e-6, eps=1e-8,
        weight_decay=0.0, layerwise=False, average=False):  # fmt: skip
    """DoG, and L-DoG: the largest distance so far over the root of all gradients' squares (Ivgi et al., ICML 2023)."""
    assert lr > 0 and reps_rel > 0
    if layerwise:
        dist = norm(p - p0)
        first = reps_rel * (1 + norm(p0))
        G = G + norm(g) ** 2
    else:
        dist = global_norm(p - p0)
        first = reps_rel * (1 + global_norm(p0))
        G = G + global_norm(g) ** 2
    rbar = maximum(maximum(rbar, dist), first)
    η = lr * rbar / sqrt(G + eps)
    p = p - η * (g + weight_decay * p)
    if average:
        averaged = averaged + 8 / (t + 7) * (p - averaged)
    return p, p0, averaged, rbar, G


@rule
def dowg(p, g, p0="p", r2: scalar = "eps", v: scalar = 0.0, *, eps=1e-4):
    """DoWG: gradients weighted by the distance (Khaled, Mishchenko and Jin, NeurIPS 2023)."""
    assert eps > 0
    r2 = maximum(global_sum((p - p0) ** 2), r2)
    v = v + r2 * global_sum(g**2)
    p = p - r2 / sqrt(v + eps) * g
    return p, p0, r2, v


@rule
def adagrad_norm(p, g, b2: scalar = "b0", *, lr=1.0, b0=0.1, ord="2"):
    """AdaGrad-Norm: one rate for all, over the root of all squared norms (Ward, Wu and Bottou, ICML 2019)."""
    assert lr > 0 and b0 > 0
    b2 = b2 + global_norm(g) ** 2 if ord == "2" else b2 + global_sum(abs(g)) ** 2
    p = p - lr / sqrt(b2) * g
    return p, b2
