"""Transforms of papers, before rules that people put them before."""

from optforge import maximum, mean, norm, rule, rules, scalar, sqrt, transform


@transform
def agc(p, g, *, clip_factor=0.01, eps=1e-3):
    """Adaptive gradient clipping, a tensor for a unit: ‖g‖ at most clip_factor·‖p‖ (Brock et al., ICML 2021)."""
    assert clip_factor > 0 and eps > 0
    p_norm = maximum(norm(p), eps)
    g_norm = norm(g)
    max_norm = p_norm * clip_factor
    trigger = g_norm > max_norm
    clipped_grad = g * (max_norm / maximum(g_norm, 1e-6))
    g = clipped_grad if trigger else g
    return g


@transform
def grokfast(g, ema="g", *, alpha=0.98, lamb=2.0):
    """Grokfast: slow gradients, by an average, weigh more (Lee et al., 2024)."""
    assert 0 <= alpha < 1
    ema = alpha * ema + (1 - alpha) * g
    g = g + lamb * ema
    return g, ema


@transform
def gradient_centralization(g, *, use_gc=True):
    """Gradient centralization (Yong et al., ECCV 2020)."""
    if use_gc:
        x = mean(g)
        g = g - x
    return g


@transform
def adanorm(g, exp_grad_norm: scalar = 0.0, *, r=0.95):
    """AdaNorm: a gradient shorter than the average norm is made as long (Dubey et al., WACV 2023)."""
    grad_norm = norm(g)
    exp_grad_norm = r * exp_grad_norm + (1 - r) * grad_norm
    g = g * (exp_grad_norm / grad_norm) if exp_grad_norm > grad_norm else g
    return g, exp_grad_norm


@rule
def heavy_ball(p, g, buf=0.0, *, lr=0.1, momentum=0.9):
    """Momentum as Polyak has it (1964)."""
    buf = momentum * buf + g
    p = p - lr * buf
    return p, buf


@rule
def ranger(p, g, exp_avg=0.0, exp_avg_sq=0.0, slow_buffer="p", *, t, lr=1e-3, k=6, alpha=0.5, N_sma_threshhold=5.0,
           beta1=0.95, beta2=0.999, eps=1e-5, weight_decay=0.0):  # fmt: skip
    """Ranger: RAdam within Lookahead (Wright, 2019)."""
    assert 0 <= alpha <= 1 and k >= 1 and lr > 0 and 0.6 < beta2 < 1
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g * g
    exp_avg = beta1 * exp_avg + (1 - beta1) * g
    beta2_t = beta2**t
    N_sma_max = 2 / (1 - beta2) - 1
    N_sma = N_sma_max - 2 * t * beta2_t / (1 - beta2_t)
    rectified = N_sma > N_sma_threshhold
    variance = (N_sma - 4) / (N_sma_max - 4) * (N_sma - 2) / N_sma * N_sma_max / (N_sma_max - 2) if rectified else 1
    step_size = sqrt((1 - beta2_t) * variance) / (1 - beta1**t) if rectified else 1 / (1 - beta1**t)
    p = p - weight_decay * lr * p
    p = p - step_size * lr * exp_avg / (sqrt(exp_avg_sq) + eps) if rectified else p - step_size * lr * exp_avg
    slow_buffer = slow_buffer + alpha * (p - slow_buffer) if t % k == 0 else slow_buffer
    p = slow_buffer if t % k == 0 else p
    return p, exp_avg, exp_avg_sq, slow_buffer


@rule
def nag(p, g, velocity=0.0, *, lr=0.01, μ=0.9):
    """Nesterov's gradient as Sutskever et al. and Lasagne write it (ICML 2013)."""
    velocity = μ * velocity - lr * g
    p = p + μ * velocity - lr * g
    return p, velocity


agc_nag = agc >> nag
grokfast_adamw = grokfast >> rules.adamw
centralized_ranger = gradient_centralization >> ranger
adanorm_heavy_ball = gradient_centralization >> adanorm >> heavy_ball
