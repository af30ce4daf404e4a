"""The optimizers of torch.optim for dense real tensors, with their options."""

from optforge import abs, maximum, mean, minimum, rule, scalar, sign, sqrt, where


@rule
def torch_adam(p, g, exp_avg=0.0, exp_avg_sq=0.0, max_exp_avg_sq=0.0, *, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8,
               weight_decay=0.0, amsgrad=False, maximize=False, decoupled_weight_decay=False):  # fmt: skip
    """Adam of PyTorch: m̂ / (√v / √(1 − β2^t) + ε), with AMSGrad's maximum before the correction."""
    assert lr >= 0 and eps >= 0 and weight_decay >= 0
    assert 0 <= beta1 < 1 and 0 <= beta2 < 1
    if maximize:
        g = -g
    if decoupled_weight_decay:
        p = p * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * p
    exp_avg = exp_avg + (1 - beta1) * (g - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g * g
    bias_correction1 = 1 - beta1**t
    bias_correction2 = 1 - beta2**t
    step_size = lr / bias_correction1
    if amsgrad:
        max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
        denom = sqrt(max_exp_avg_sq) / sqrt(bias_correction2) + eps
    else:
        denom = sqrt(exp_avg_sq) / sqrt(bias_correction2) + eps
    p = p - step_size * exp_avg / denom
    return p, exp_avg, exp_avg_sq, max_exp_avg_sq


@rule
def torch_adamw(p, g, m=0.0, v=0.0, v_max=0.0, *, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2,
                amsgrad=False, maximize=False):  # fmt: skip
    """AdamW of PyTorch: the parameter shrinks by 1 − lr·λ before Adam's step."""
    assert lr >= 0 and eps >= 0 and weight_decay >= 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1
    g = -g if maximize else g
    p = p - lr * weight_decay * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**t)
    if amsgrad:
        v_max = maximum(v_max, v)
    v_hat = (v_max if amsgrad else v) / (1 - beta2**t)
    p = p - lr * m_hat / (sqrt(v_hat) + eps)
    return p, m, v, v_max


@rule
def torch_nadam(p, g, exp_avg=0.0, exp_avg_sq=0.0, mu_product: scalar = 1.0, *, t, lr=2e-3, beta1=0.9, beta2=0.999,
                eps=1e-8, weight_decay=0.0, momentum_decay=4e-3, decoupled_weight_decay=False, maximize=False):  # fmt: skip
    """NAdam of PyTorch: μ_t = β1·(1 − ½·0.96^(t·ψ)), a product of all μ so far, and one μ ahead."""
    assert lr >= 0 and eps >= 0 and weight_decay >= 0 and momentum_decay >= 0
    assert 0 <= beta1 < 1 and 0 <= beta2 < 1
    if maximize:
        g = -g
    if decoupled_weight_decay:
        p = p * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * p
    mu = beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
    mu_product = mu_product * mu
    exp_avg = beta1 * exp_avg + (1 - beta1) * g
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g**2
    denom = sqrt(exp_avg_sq / (1 - beta2**t)) + eps
    p = p - lr * (1 - mu) / (1 - mu_product) * g / denom
    p = p - lr * mu_next / (1 - mu_product * mu_next) * exp_avg / denom
    return p, exp_avg, exp_avg_sq, mu_product


@rule
def torch_radam(p, g, m=0.0, v=0.0, *, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0,
                decoupled_weight_decay=False, maximize=False):  # fmt: skip
    """RAdam of PyTorch: m̂ alone while ρ_t ≤ 5, then r_t·m̂·√(1 − β2^t) / (√v + ε)."""
    assert lr >= 0 and 0 <= beta1 < 1 and 0.6 < beta2 < 1 and weight_decay >= 0
    if maximize:
        g = -g
    if decoupled_weight_decay:
        p = p * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**t)
    rho_inf = 2 / (1 - beta2) - 1
    rho_t = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    rect = sqrt(maximum(((rho_t - 4) * (rho_t - 2) * rho_inf) / ((rho_inf - 4) * (rho_inf - 2) * rho_t), 0))
    adaptive = sqrt(1 - beta2**t) / (sqrt(v) + eps)
    p = p - lr * m_hat * adaptive * rect if rho_t > 5 else p - lr * m_hat
    return p, m, v


@rule
def torch_adamax(p, g, exp_avg=0.0, exp_inf=0.0, *, t, lr=2e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0,
                 maximize=False):  # fmt: skip
    """Adamax of PyTorch: u = max(β2·u, |g| + ε), p − lr / (1 − β1^t)·m / u."""
    assert 0 <= beta1 < 1 and 0 <= beta2 < 1 and eps >= 0
    g = -g if maximize else g
    g = g + weight_decay * p
    exp_avg = exp_avg + (1 - beta1) * (g - exp_avg)
    exp_inf = maximum(beta2 * exp_inf, abs(g) + eps)
    clr = lr / (1 - beta1**t)
    p = p - clr * exp_avg / exp_inf
    return p, exp_avg, exp_inf


@rule
def torch_asgd(p, g, ax=0.0, eta: scalar = "lr", mu: scalar = 1.0, *, t, lr=1e-2, lambd=1e-4, alpha=0.75, t0=1e6,
               weight_decay=0.0, maximize=False):  # fmt: skip
    """ASGD of PyTorch: SGD with rate lr / (1 + λ·lr·t)^α, and the mean of what comes after t0."""
    assert lr > 0 and lambd >= 0 and t0 >= 0 and weight_decay >= 0
    if maximize:
        g = -g
    g = g + weight_decay * p
    p = p * (1 - lambd * eta)
    p = p - eta * g
    ax = ax + (p - ax) * mu if mu != 1 else p
    eta = lr / (1 + lambd * lr * t) ** alpha
    mu = 1 / maximum(1, t - t0)
    return p, ax, eta, mu


@rule
def torch_adagrad(p, g, state_sum="initial_accumulator_value", *, t, lr=1e-2, lr_decay=0.0, weight_decay=0.0,
                  initial_accumulator_value=0.0, eps=1e-10, maximize=False):  # fmt: skip
    """Adagrad of PyTorch: rate lr / (1 + (t − 1)·lr_decay) over √Σg² + ε."""
    assert lr >= 0 and lr_decay >= 0 and weight_decay >= 0 and initial_accumulator_value >= 0 and eps >= 0
    g = -g if maximize else g
    g = g + weight_decay * p
    clr = lr / (1 + (t - 1) * lr_decay)
    state_sum = state_sum + g * g
    std = sqrt(state_sum) + eps
    p = p - clr * g / std
    return p, state_sum


@rule
def torch_adadelta(p, g, square_avg=0.0, acc_delta=0.0, *, lr=1.0, rho=0.9, eps=1e-6, weight_decay=0.0, maximize=False):
    """Adadelta of PyTorch: √(Δ + ε) / √(v + ε)·g."""
    assert lr >= 0 and 0 <= rho <= 1 and eps >= 0 and weight_decay >= 0
    if maximize:
        g = -g
    g = g + weight_decay * p
    square_avg = rho * square_avg + (1 - rho) * g**2
    std = sqrt(square_avg + eps)
    delta = sqrt(acc_delta + eps) / std * g
    acc_delta = rho * acc_delta + (1 - rho) * delta**2
    p = p - lr * delta
    return p, square_avg, acc_delta


@rule
def torch_rmsprop(p, g, square_avg=0.0, grad_avg=0.0, buf=0.0, *, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0,
                  momentum=0.9, centered=False, with_momentum=False, maximize=False):  # fmt: skip
    """RMSprop of PyTorch: g / (√v + ε), or √(v − ḡ²) where centered, through a buffer where there is momentum."""
    assert lr >= 0 and eps >= 0 and momentum >= 0 and weight_decay >= 0 and alpha >= 0
    if maximize:
        g = -g
    g = g + weight_decay * p
    square_avg = alpha * square_avg + (1 - alpha) * g * g
    if centered:
        grad_avg = grad_avg + (1 - alpha) * (g - grad_avg)
        avg = sqrt(square_avg - grad_avg**2)
    else:
        avg = sqrt(square_avg)
    avg = avg + eps
    if with_momentum:
        buf = momentum * buf + g / avg
        p = p - lr * buf
    else:
        p = p - lr * g / avg
    return p, square_avg, grad_avg, buf


@rule
def torch_rprop(p, g, prev=0.0, step_size="lr", *, lr=1e-2, etaminus=0.5, etaplus=1.2, step_size_min=1e-6,
                step_size_max=50.0, maximize=False):  # fmt: skip
    """Rprop of PyTorch: every element has a step of its own, longer while its sign stays and shorter where it turns."""
    assert lr > 0 and 0 < etaminus < 1 < etaplus and 0 < step_size_min <= step_size_max
    g = -g if maximize else g
    s = g * prev
    factor = where(s > 0, etaplus, where(s < 0, etaminus, 1))
    step_size = minimum(maximum(step_size * factor, step_size_min), step_size_max)
    g = where(s < 0, 0, g)
    p = p - sign(g) * step_size
    prev = g
    return p, prev, step_size


@rule
def torch_sgd(p, g, momentum_buffer=0.0, n: scalar = 0, *, lr=1e-3, momentum=0.9, dampening=0.0, weight_decay=0.0,
              nesterov=False, plain=False, maximize=False):  # fmt: skip
    """SGD of PyTorch: the buffer is the first gradient itself, and dampening begins with the second."""
    assert lr >= 0 and momentum >= 0 and weight_decay >= 0
    if maximize:
        g = -g
    g = g + weight_decay * p
    if not plain:
        momentum_buffer = momentum * momentum_buffer + (1 - dampening) * g if n > 0 else g
        n = n + 1
        if nesterov:
            g = g + momentum * momentum_buffer
        else:
            g = momentum_buffer
    p = p - lr * g
    return p, momentum_buffer, n


@rule
def torch_adafactor(p, g, variance=0.0, *, t, lr=1e-2, beta2_decay=-0.8, eps1=1e-7, eps2=1e-3, d=1.0, weight_decay=0.0,
                    maximize=False):  # fmt: skip
    """Adafactor of PyTorch for a vector: not factored, its update clipped by its rms, its rate relative to p's."""
    assert lr >= 0 and beta2_decay <= 0 and eps1 >= 0 and eps2 >= 0 and d >= 1 and weight_decay >= 0
    g = -g if maximize else g
    one_minus_beta2_t = t**beta2_decay
    rho_t = minimum(lr, 1 / sqrt(t))
    rms_p = sqrt(mean(p**2))
    alpha = maximum(eps2, rms_p) * rho_t
    p = p * (1 - lr * weight_decay)
    variance = variance + one_minus_beta2_t * (g * g - variance)
    update = g * (1 / sqrt(maximum(variance, eps1 * eps1)))
    rms = sqrt(mean(update**2))
    denom = maximum(1, rms / d)
    p = p - alpha / denom * update
    return p, variance
