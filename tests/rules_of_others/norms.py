"""Rules that measure a tensor, or all of them, before they step."""

from optforge import (
    abs,
    exp,
    global_norm,
    global_sum,
    log,
    max_abs,
    maximum,
    mean,
    minimum,
    norm,
    rule,
    scalar,
    sqrt,
    sum,
    where,
)


@rule
def timm_lamb(p, g, m=0.0, v=0.0, *, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=0.01,
              max_grad_norm=1.0, clipped=True, bias_correction=True, grad_averaging=True, trust_clip=False,
              always_adapt=False, decoupled_decay=False):  # fmt: skip
    """LAMB with the options of timm: gradients clipped by their global norm, the trust ratio clipped (You et al., 2020)."""
    assert lr >= 0 and eps >= 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1 and max_grad_norm > 0
    if clipped:
        clip = maximum(global_norm(g) / max_grad_norm, 1)
        g = g / clip
    beta3 = 1 - beta1 if grad_averaging else 1.0
    m = beta1 * m + beta3 * g
    v = beta2 * v + (1 - beta2) * g * g
    if bias_correction:
        denom = sqrt(v) / sqrt(1 - beta2**t) + eps
        update = m / (1 - beta1**t) / denom
    else:
        update = m / (sqrt(v) + eps)
    if decoupled_decay:
        p = p * (1 - lr * weight_decay)
    else:
        update = update + weight_decay * p
    w_norm = norm(p)
    u_norm = norm(update)
    trust_ratio = w_norm / u_norm if w_norm > 0 and u_norm > 0 else 1
    if trust_clip:
        trust_ratio = minimum(trust_ratio, 1)
    if not always_adapt:
        trust_ratio = trust_ratio if weight_decay != 0 else 1
    p = p - lr * trust_ratio * update
    return p, m, v


@rule
def timm_lars(p, g, buf=0.0, n: scalar = 0, *, lr=1.0, momentum=0.9, dampening=0.0, weight_decay=1e-4,
              trust_coeff=0.001, eps=1e-8, nesterov=False, trust_clip=False, scaled="trust"):  # fmt: skip
    """LARS with the options of timm, LARC where the ratio is clipped (You, Gitman and Ginsburg, 2017)."""
    assert lr > 0 and momentum >= 0 and weight_decay >= 0
    if scaled != "off":
        w_norm = norm(p)
        g_norm = norm(g)
        trust_ratio = trust_coeff * w_norm / (g_norm + w_norm * weight_decay + eps)
        trust_ratio = trust_ratio if w_norm > 0 and g_norm > 0 else 1.0
        if trust_clip:
            trust_ratio = minimum(trust_ratio / lr, 1)
        g = (g + weight_decay * p) * trust_ratio
    buf = momentum * buf + (1 - dampening) * g if n > 0 else g
    n = n + 1
    g = g + momentum * buf if nesterov else buf
    p = p - lr * g
    return p, buf, n


@rule
def apex_novograd(p, g, m=0.0, v: scalar = 0.0, *, t, lr=1e-3, beta1=0.95, beta2=0.98, eps=1e-8, weight_decay=0.0,
                  grad_averaging=True, bias_correction=True, reg_inside_moment=False, norm_type="2",
                  init_zero=False):  # fmt: skip
    """NovoGrad with the options of NVIDIA's Apex: its second moment is an average of norms (Ginsburg et al., 2019)."""
    assert 0 <= beta1 < 1 and 0 <= beta2 < 1
    if norm_type == "inf":
        n = max_abs(g)
        v_next = beta2 * v + (1 - beta2) * n
    else:
        n = norm(g)
        v_next = sqrt(beta2 * v**2 + (1 - beta2) * n**2)
    if init_zero:
        v = v_next
    else:
        v = v_next if t > 1 else n
    denom = v / sqrt(1 - beta2**t) + eps if bias_correction else v + eps
    beta3 = 1 - beta1 if grad_averaging else 1
    correction = 1 - beta1**t if bias_correction else 1
    if reg_inside_moment:
        g = g / denom + weight_decay * p
        m = beta1 * m + beta3 * g
        p = p - lr * (m / correction)
    else:
        m = beta1 * m + beta3 * g
        update = m / correction / denom + weight_decay * p
        p = p - lr * update
    return p, m, v


@rule
def fromage(p, g, largest: scalar = 0.0, *, lr=0.01, p_bound=2.0, bounded=False):
    """Fromage: the gradient as long as the parameter, then both over √(1 + lr²) (Bernstein et al., NeurIPS 2020)."""
    assert lr >= 0
    p_norm = norm(p)
    g_norm = norm(g)
    if bounded:
        largest = largest if largest > 0 else p_bound * p_norm
    p = p - lr * g * (p_norm / g_norm) if p_norm > 0 and g_norm > 0 else p - lr * g
    p = p / sqrt(1 + lr**2)
    if bounded:
        p_norm = norm(p)
        p = p * (largest / p_norm) if p_norm > largest else p
    return p, largest


@rule
def adafactor(p, g, m=0.0, v=0.0, *, t, lr=1e-3, eps1=1e-30, eps2=1e-3, clip_threshold=1.0, decay_rate=-0.8, beta1=0.9,
              weight_decay=0.0, scale_parameter=True, relative_step=True, warmup_init=False, momentum=False):  # fmt: skip
    """Adafactor as Transformers has it, for what it does not factor (Shazeer and Stern, ICML 2018)."""
    assert clip_threshold > 0 and decay_rate <= 0 and 0 <= beta1 < 1
    if relative_step:
        min_step = 1e-6 * t if warmup_init else 1e-2
        rel_step_sz = minimum(min_step, 1 / sqrt(t))
    else:
        rel_step_sz = lr
    RMS = sqrt(mean(p**2))
    param_scale = maximum(eps2, RMS) if scale_parameter else 1
    lr_t = param_scale * rel_step_sz
    beta2t = 1 - t**decay_rate
    update = g**2 + eps1
    v = beta2t * v + (1 - beta2t) * update
    update = g / sqrt(v)
    rms = sqrt(mean(update**2))
    update = update / maximum(1, rms / clip_threshold)
    update = update * lr_t
    if momentum:
        m = beta1 * m + (1 - beta1) * update
        update = m
    p = p - weight_decay * lr_t * p
    p = p - update
    return p, m, v


@rule
def came(p, g, exp_avg=0.0, exp_avg_sq=0.0, exp_avg_res=0.0, *, lr=2e-4, beta1=0.9, beta2=0.999, beta3=0.9999,
         eps1=1e-30, eps2=1e-16, clip_threshold=1.0, weight_decay=0.0):  # fmt: skip
    """CAME without factors: Adafactor's update, divided by how far it is from its average (Luo et al., ACL 2023)."""
    assert 0 <= beta1 < 1 and 0 <= beta2 < 1 and 0 <= beta3 < 1 and clip_threshold > 0
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * (g**2 + eps1)
    update = g * (1 / sqrt(exp_avg_sq))
    update = update / maximum(norm(update) / sqrt(sum(where(g == g, 1, 1))) / clip_threshold, 1)
    exp_avg = beta1 * exp_avg + (1 - beta1) * update
    res = (update - exp_avg) ** 2 + eps2
    exp_avg_res = beta3 * exp_avg_res + (1 - beta3) * res
    update = exp_avg / sqrt(exp_avg_res)
    p = p - lr * weight_decay * p
    p = p - lr * update
    return p, exp_avg, exp_avg_sq, exp_avg_res


@rule
def stable_adamw(p, g, exp_avg=0.0, exp_avg_sq=0.0, *, t, lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=1e-2):
    """StableAdamW: β debiased, the rate over the rms of g² / v where that is above 1 (Wortsman et al., 2023)."""
    assert 0 <= beta1 < 1 and 0 <= beta2 < 1 and eps > 0
    beta1_hat = beta1 * ((1 - beta1 ** (t - 1)) / (1 - beta1**t))
    beta2_hat = beta2 * ((1 - beta2 ** (t - 1)) / (1 - beta2**t))
    exp_avg = exp_avg + (1 - beta1_hat) * (g - exp_avg)
    exp_avg_sq = beta2_hat * exp_avg_sq + (1 - beta2_hat) * g * g
    rms = sqrt(mean(g**2 / maximum(exp_avg_sq, eps**2)))
    eta = lr / maximum(1, rms)
    p = p * (1 - eta * weight_decay)
    p = p - eta * exp_avg / (sqrt(exp_avg_sq) + eps)
    return p, exp_avg, exp_avg_sq


@rule
def adam_mini(p, g, m=0.0, vmean: scalar = 0.0, *, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0):
    """Adam-mini: one second moment for a tensor, of the mean of g² (Zhang et al., 2024)."""
    assert 0 <= beta1 < 1 and 0 <= beta2 < 1
    p = p * (1 - lr * weight_decay) if weight_decay > 0 else p
    tmp_lr = mean(g * g)
    vmean = beta2 * vmean + (1 - beta2) * tmp_lr
    m = beta1 * m + (1 - beta1) * g
    h = sqrt(vmean) / sqrt(1 - beta2**t) + eps
    stepsize = 1 / (1 - beta1**t) / h
    p = p - lr * stepsize * m
    return p, m, vmean


@rule
def cautious_adamw(p, g, exp_avg=0.0, exp_avg_sq=0.0, *, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-6,
                   weight_decay=0.0, correct_bias=True, cautious=True):  # fmt: skip
    """C-AdamW: only where the step has the gradient's sign, longer by as much as is left out (Liang et al., 2024)."""
    assert 0 <= beta1 < 1 and 0 <= beta2 < 1 and eps >= 0
    exp_avg = beta1 * exp_avg + (1 - beta1) * g
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g**2
    denom = sqrt(exp_avg_sq) + eps
    step_size = lr * sqrt(1 - beta2**t) / (1 - beta1**t) if correct_bias else lr
    norm_grad = exp_avg / denom
    if cautious:
        mask = where(exp_avg * g > 0, 1, 0)
        norm_grad = norm_grad * mask / maximum(mean(mask), 1e-3)
    p = p - step_size * norm_grad
    p = p - lr * weight_decay * p
    return p, exp_avg, exp_avg_sq


@rule
def mars_adamw(p, g, m=0.0, v=0.0, last_grad="g", *, t, lr=3e-3, β1=0.95, β2=0.99, γ=0.025, eps=1e-8, weight_decay=0.0,
               mars_type="adamw"):  # fmt: skip
    """MARS: variance reduced by the last gradient, clipped to a norm of 1, under AdamW or Lion (Yuan et al., 2024)."""
    assert 0 <= β1 < 1 and 0 <= β2 < 1 and γ >= 0
    c = g + γ * (β1 / (1 - β1)) * (g - last_grad)
    c_norm = norm(c)
    c = c / c_norm if c_norm > 1 else c
    m = β1 * m + (1 - β1) * c
    if mars_type == "lion":
        u = where(m > 0, 1, where(m < 0, -1, 0))
    else:
        v = β2 * v + (1 - β2) * c**2
        u = m / (1 - β1**t) / (sqrt(v) / sqrt(1 - β2**t) + eps)
    p = p - lr * (u + weight_decay * p)
    last_grad = g
    return p, m, v, last_grad


@rule
def adai(p, g, exp_avg=0.0, exp_avg_sq=0.0, beta1_prod=1.0, *, t, lr=1.0, beta0=0.1, beta2=0.99, eps=1e-3,
         weight_decay=0.0, dampening=0.9, stable=False, v2=False):  # fmt: skip
    """Adai, and AdaiV2 with its dampening: inertia of each element by its v̂ over all tensors' (Xie et al., ICML 2022)."""
    assert 0 <= beta0 < 1 and 0 <= beta2 < 1 and eps > 0 and 0 <= dampening <= 1
    if stable:
        p = p * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * p
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g * g
    v_hat = exp_avg_sq / (1 - beta2**t)
    param_size = global_sum(where(v_hat == v_hat, 1, 1))
    v_hat_mean = global_sum(v_hat) / param_size
    tmp = v_hat / v_hat_mean
    if v2:
        tmp = exp(log(tmp) / (3 - 2 * dampening))
    beta1 = minimum(maximum(1 - beta0 * tmp, 0), 1 - eps)
    beta1_prod = beta1_prod * beta1
    if v2:
        exp_avg = beta1 * exp_avg + exp(dampening * log(1 - beta1)) * g
        p = p - lr * beta0 ** (1 - dampening) * exp_avg / (1 - beta1_prod)
    else:
        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        p = p - lr * exp_avg / (1 - beta1_prod)
    return p, exp_avg, exp_avg_sq, beta1_prod


@rule
def swats(p, g, exp_avg=0.0, exp_avg_sq=0.0, momentum_buffer=0.0, exp_avg2: scalar = 0.0, sgd_lr: scalar = -1.0, *, t,
          lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, tolerance=1e-9, nesterov=False):  # fmt: skip
    """SWATS: Adam until the rate of SGD that its steps amount to has settled, then SGD (Keskar and Socher, 2017)."""
    assert lr > 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1 and tolerance > 0
    adam = sgd_lr < 0
    exp_avg = beta1 * exp_avg + (1 - beta1) * g
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g**2
    bias_correction2 = 1 - beta2**t
    step_size = lr * sqrt(bias_correction2) / (1 - beta1**t)
    d_p = -step_size * (exp_avg / (sqrt(exp_avg_sq) + eps))
    buf = beta1 * momentum_buffer + g
    momentum_buffer = momentum_buffer if adam else buf
    update = (1 - beta1) * buf
    if nesterov:
        update = update + beta1 * buf
    p = p + d_p if adam else p - sgd_lr * update
    pg = sum(d_p * g)
    scaling = sum(d_p * d_p) / -pg if pg != 0 else 0.0
    exp_avg2 = beta2 * exp_avg2 + (1 - beta2) * scaling if adam and pg != 0 else exp_avg2
    corrected = exp_avg2 / bias_correction2
    settled = t > 1 and pg != 0 and corrected > 0 and abs(corrected - scaling) < tolerance
    sgd_lr = corrected if adam and settled else sgd_lr
    return p, exp_avg, exp_avg_sq, momentum_buffer, exp_avg2, sgd_lr


@rule
def ngd(p, g, v=0.0, *, lr=0.1, momentum=0.9, eps=1e-12, scope="all"):
    """Normalised SGD: a step of length lr for all tensors together, or for each (Cutkosky and Mehta, ICML 2020)."""
    assert lr > 0 and 0 <= momentum < 1 and eps >= 0
    v = momentum * v + (1 - momentum) * g
    length = global_norm(v) if scope == "all" else norm(v)
    p = p - lr * v / (length + eps)
    return p, v


@rule
def madgrad(p, g, x0="p", s=0.0, grad_sum_sq=0.0, *, t, lr=1e-2, momentum=0.9, eps=1e-6, weight_decay=0.0,
            decouple=False):  # fmt: skip
    """MADGRAD: dual averaging under a cube root, which exp and log give (Defazio and Jelassi, 2021)."""
    assert lr > 0 and eps > 0 and 0 <= momentum < 1
    lr_t = lr + eps
    lamb = lr_t * sqrt(t)
    if not decouple:
        g = g + weight_decay * p
    grad_sum_sq = grad_sum_sq + lamb * g * g
    s = s + lamb * g
    rms = exp(log(grad_sum_sq) / 3) + eps
    z = x0 - s / rms
    p_old = p
    p = momentum * p + (1 - momentum) * z
    if decouple:
        p = p - lr_t * weight_decay * p_old
    return p, x0, s, grad_sum_sq


@rule
def sm3(p, g, accumulator=0.0, buf=0.0, *, lr=0.1, momentum=0.0, beta=0.0, eps=1e-30, averaged=False):
    """SM3 for a vector, whose cover is its elements (Anil et al., NeurIPS 2019)."""
    assert 0 <= momentum < 1 and 0 <= beta < 1
    update = accumulator * beta + (1 - beta) * g**2 if beta > 0 else accumulator + g**2
    accumulator = maximum(accumulator, update) if beta > 0 else update
    update = g / sqrt(update + eps)
    if averaged:
        buf = momentum * buf + (1 - momentum) * update
        update = buf
    p = p - lr * update
    return p, accumulator, buf
