"""What has been made of Adam, element by element."""

from optforge import abs, exp, log, maximum, minimum, rule, scalar, sign, sqrt


@rule
def amsgrad(p, g, m=0.0, v=0.0, v̂=0.0, *, t, α=1e-3, β1=0.9, β2=0.999, ε=1e-8, falling=True):
    """AMSGrad as in its paper: no corrections of bias, α_t = α / √t (Reddi, Kale and Kumar, ICLR 2018)."""
    assert 0 <= β1 < 1 and 0 <= β2 < 1
    α_t = α / sqrt(t) if falling else α
    m = β1 * m + (1 - β1) * g
    v = β2 * v + (1 - β2) * g**2
    v̂ = maximum(v̂, v)
    p = p - α_t * m / (sqrt(v̂) + ε)
    return p, m, v, v̂


@rule
def adabelief(p, g, m=0.0, s=0.0, s_max=0.0, *, t, lr=1e-3, β1=0.9, β2=0.999, ε=1e-16, weight_decay=0.0,
              decouple=True, fixed_decay=False, amsgrad=False):  # fmt: skip
    """AdaBelief: s is the variance of g about m, with ε inside and outside the root (Zhuang et al., NeurIPS 2020)."""
    assert 0 <= β1 < 1 and 0 <= β2 < 1 and ε >= 0
    if decouple:
        if fixed_decay:
            p = p * (1 - weight_decay)
        else:
            p = p * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * p
    m = β1 * m + (1 - β1) * g
    s = β2 * s + (1 - β2) * (g - m) ** 2 + ε
    if amsgrad:
        s_max = maximum(s_max, s)
        denom = sqrt(s_max) / sqrt(1 - β2**t) + ε
    else:
        denom = sqrt(s) / sqrt(1 - β2**t) + ε
    p = p - lr / (1 - β1**t) * m / denom
    return p, m, s, s_max


@rule
def adabound(p, g, exp_avg=0.0, exp_avg_sq=0.0, max_exp_avg_sq=0.0, *, t, lr=1e-3, base_lr=1e-3, final_lr=0.1,
             beta1=0.9, beta2=0.999, gamma=1e-3, eps=1e-8, weight_decay=0.0, amsbound=False):  # fmt: skip
    """AdaBound: Adam's rate of each element between bounds that close in on SGD's (Luo et al., ICLR 2019)."""
    assert lr > 0 and base_lr > 0 and final_lr > 0 and 0 < gamma < 1
    g = g + weight_decay * p
    exp_avg = beta1 * exp_avg + (1 - beta1) * g
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g * g
    if amsbound:
        max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
        denom = sqrt(max_exp_avg_sq) + eps
    else:
        denom = sqrt(exp_avg_sq) + eps
    step_size = lr * sqrt(1 - beta2**t) / (1 - beta1**t)
    final = final_lr * lr / base_lr
    lower = final * (1 - 1 / (gamma * t + 1))
    upper = final * (1 + 1 / (gamma * t))
    step_size = minimum(maximum(step_size / denom, lower), upper)
    p = p - step_size * exp_avg
    return p, exp_avg, exp_avg_sq, max_exp_avg_sq


@rule
def adamod(p, g, m=0.0, v=0.0, s=0.0, *, t, lr=1e-3, beta1=0.9, beta2=0.999, beta3=0.999, eps=1e-8, weight_decay=0.0):
    """AdaMod: each element's rate at most its own average (Ding et al., 2019)."""
    assert 0 <= beta3 < 1
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    p = p - weight_decay * lr * p
    step_size = lr * sqrt(1 - beta2**t) / (1 - beta1**t)
    eta = step_size / (sqrt(v) + eps)
    s = beta3 * s + (1 - beta3) * eta
    eta = minimum(eta, s)
    p = p - eta * m
    return p, m, v, s


@rule
def adan(p, g, m=0.0, v=0.0, n=0.0, prev="g", *, t, lr=1e-3, β1=0.98, β2=0.92, β3=0.99, eps=1e-8, weight_decay=0.02,
         no_prox=False):  # fmt: skip
    """Adan: Nesterov's momentum with the difference of gradients (Xie et al., 2022)."""
    assert 0 <= β1 < 1 and 0 <= β2 < 1 and 0 <= β3 < 1
    diff = g - prev
    m = β1 * m + (1 - β1) * g
    v = β2 * v + (1 - β2) * diff
    update = g + β2 * diff
    n = β3 * n + (1 - β3) * update**2
    denom = sqrt(n) / sqrt(1 - β3**t) + eps
    step_size = lr / (1 - β1**t)
    step_size_diff = lr * β2 / (1 - β2**t)
    if no_prox:
        p = p * (1 - lr * weight_decay)
        p = p - step_size * m / denom
        p = p - step_size_diff * v / denom
    else:
        p = p - step_size * m / denom
        p = p - step_size_diff * v / denom
        p = p / (1 + lr * weight_decay)
    prev = g
    return p, m, v, n, prev


@rule
def ademamix(p, g, m1=0.0, m2=0.0, ν=0.0, *, t, lr=1e-3, β1=0.9, β2=0.999, β3=0.9999, α=5.0, T=1000.0, eps=1e-8,
             weight_decay=0.0, scheduled=True):  # fmt: skip
    """AdEMAMix: a fast and a slow average, the slow one with warm-up of α and β3 (Pagliardini et al., 2024)."""
    assert 0 < β1 < 1 and 0 < β2 < 1 and 0 < β3 < 1 and T > 0
    if scheduled:
        αt = minimum(t * α / T, α)
        ln_β1 = log(β1)
        ln_β3 = log(β3)
        β3t = minimum(exp(ln_β1 * ln_β3 / ((1 - t / T) * ln_β3 + t / T * ln_β1)), β3) if t < T else β3
    else:
        αt = α
        β3t = β3
    m1 = β1 * m1 + (1 - β1) * g
    m2 = β3t * m2 + (1 - β3t) * g
    ν = β2 * ν + (1 - β2) * g**2
    m̂1 = m1 / (1 - β1**t)
    ν̂ = ν / (1 - β2**t)
    p = p - lr * ((m̂1 + αt * m2) / (sqrt(ν̂) + eps) + weight_decay * p)
    return p, m1, m2, ν


@rule
def adopt(p, g, m=0.0, v=0.0, *, t, lr=1e-3, beta1=0.9, beta2=0.9999, eps=1e-6, weight_decay=0.0, decouple=False,
          clip=True):  # fmt: skip
    """ADOPT: normalised by the moment before this gradient, and no step at t = 1 (Taniguchi et al., NeurIPS 2024)."""
    assert lr >= 0 and eps > 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1
    if decouple:
        p = p * (1 - lr * weight_decay) if t > 1 else p
    else:
        g = g + weight_decay * p
    normed = g / maximum(sqrt(v), eps)
    if clip:
        limit = (t - 1) ** 0.25
        normed = minimum(maximum(normed, -limit), limit)
    m = beta1 * m + (1 - beta1) * normed if t > 1 else m
    p = p - lr * m if t > 1 else p
    v = beta2 * v + (1 - beta2) * g**2 if t > 1 else g**2
    return p, m, v


@rule
def yogi(p, g, m=1e-6, v=1e-6, *, t, lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-3, weight_decay=0.0):
    """Yogi: v moves by a share of g² and not of its distance to it (Zaheer et al., NeurIPS 2018)."""
    assert 0 <= beta1 < 1 and 0 <= beta2 < 1
    g = g + weight_decay * p
    m = beta1 * m + (1 - beta1) * g
    g2 = g**2
    v = v - (1 - beta2) * sign(v - g2) * g2
    step_size = lr / (1 - beta1**t)
    p = p - step_size * m / (sqrt(v) / sqrt(1 - beta2**t) + eps)
    return p, m, v


@rule
def qhadam(p, g, g_bar=0.0, s_bar=0.0, w1: scalar = 0.0, w2: scalar = 0.0, *, lr=1e-3, beta1=0.995, beta2=0.999,
           nu1=0.7, nu2=1.0, eps=1e-8, weight_decay=0.0, decouple=False):  # fmt: skip
    """QHAdam: quasi-hyperbolic mixtures of the gradient and its averages (Ma and Yarats, ICLR 2019)."""
    assert 0 <= beta1 < 1 and 0 <= beta2 < 1
    if decouple:
        p = p * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * p
    w1 = 1 + beta1 * w1
    w2 = 1 + beta2 * w2
    b1 = 1 - 1 / w1
    b2 = 1 - 1 / w2
    g_bar = b1 * g_bar + (1 - b1) * g
    s_bar = b2 * s_bar + (1 - b2) * g**2
    num = (1 - nu1) * g + nu1 * g_bar
    denom = sqrt((1 - nu2) * g**2 + nu2 * s_bar) + eps
    p = p - lr * num / denom
    return p, g_bar, s_bar, w1, w2


@rule
def laprop(p, g, n=0.0, m=0.0, lr_1: scalar = 0.0, lr_2: scalar = 0.0, *, lr=4e-4, μ=0.9, ν=0.999, ε=1e-15,
           weight_decay=0.0):  # fmt: skip
    """LaProp: momentum of gradients already normalised, corrected by the rates so far (Ziyin, Wang and Ueda, 2020)."""
    assert 0 <= μ < 1 and 0 <= ν < 1
    n = ν * n + (1 - ν) * g**2
    lr_1 = lr_1 * μ + (1 - μ) * lr
    lr_2 = lr_2 * ν + (1 - ν)
    bias_correction1 = lr_1 / lr if lr != 0 else 1
    denom = sqrt(n / lr_2) + ε
    step = g / denom
    m = μ * m + lr * (1 - μ) * step
    p = p - 1 / bias_correction1 * m
    p = p - lr * weight_decay * p
    return p, n, m, lr_1, lr_2


@rule
def padam(p, g, m=0.0, v=0.0, v_max=0.0, *, t, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, partial=0.25,
          weight_decay=5e-4, amsgrad=True):  # fmt: skip
    """Padam: the root of v to a power between SGD's 0 and Adam's 1 (Chen et al., IJCAI 2020)."""
    assert 0 < partial <= 0.5
    g = g + weight_decay * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    if amsgrad:
        v_max = maximum(v_max, v)
        denom = sqrt(v_max) + eps
    else:
        denom = sqrt(v) + eps
    step_size = lr * sqrt(1 - beta2**t) / (1 - beta1**t)
    denom = exp(2 * partial * log(denom))
    p = p - step_size * m / denom
    return p, m, v, v_max


@rule
def diffgrad(p, g, exp_avg=0.0, exp_avg_sq=0.0, previous_grad=0.0, *, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8,
             weight_decay=0.0):  # fmt: skip
    """diffGrad: a friction 1 / (1 + e^−|Δg|), by how much the gradient has changed (Dubey et al., 2019)."""
    g = g + weight_decay * p
    exp_avg = beta1 * exp_avg + (1 - beta1) * g
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g * g
    denom = sqrt(exp_avg_sq) + eps
    diff = abs(previous_grad - g)
    dfc = 1 / (1 + exp(-diff))
    previous_grad = g
    exp_avg1 = exp_avg * dfc
    step_size = lr * sqrt(1 - beta2**t) / (1 - beta1**t)
    p = p - step_size * exp_avg1 / denom
    return p, exp_avg, exp_avg_sq, previous_grad


@rule
def grams(p, g, m=0.0, v=0.0, *, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=0.0):
    """Grams: how far is Adam's, in which direction is the gradient's (Cao, Li and Song, 2024)."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    u = m / (1 - beta1**t) / (sqrt(v / (1 - beta2**t)) + eps)
    û = sign(g) * abs(u)
    p = p - lr * (û + weight_decay * p)
    return p, m, v


@rule
def noam_adam(p, g, m=0.0, v=0.0, *, t, factor=2.0, model_size=512, warmup=4000, beta1=0.9, beta2=0.98, eps=1e-9):
    """Adam under the Transformer's rate, d^−½·min(t^−½, t·w^−1.5) (Vaswani et al., NIPS 2017)."""
    assert model_size > 0 and warmup > 0
    rate = factor * (model_size**-0.5 * minimum(t**-0.5, t * warmup**-1.5))
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    p = p - rate * (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)
    return p, m, v


@rule
def sophia(p, g, m=0.0, h=0.0, *, t, lr=1e-4, beta1=0.965, beta2=0.99, rho=0.04, bs=480, k=10, eps=1e-15,
           weight_decay=0.1):  # fmt: skip
    """Sophia with g² for the Hessian's diagonal, renewed at every k-th step (Liu et al., ICLR 2024)."""
    assert rho > 0 and bs > 0 and k >= 1
    p = p * (1 - lr * weight_decay)
    m = beta1 * m + (1 - beta1) * g
    h = beta2 * h + (1 - beta2) * g * g if t % k == 1 or k == 1 else h
    ratio = minimum(abs(m) / (rho * bs * h + eps), 1)
    p = p - lr * sign(m) * ratio
    return p, m, h


@rule
def adam_ema(p, g, m=0.0, v=0.0, ema="p", num_updates: scalar = 0, *, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8,
             decay=0.999, warm=True):  # fmt: skip
    """Adam beside an average of the weights, whose decay warms up as TensorFlow's does: min(d, (1 + n) / (10 + n))."""
    assert 0 <= decay <= 1
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    p = p - lr * sqrt(1 - beta2**t) / (1 - beta1**t) * m / (sqrt(v) + eps)
    num_updates = num_updates + 1
    d = minimum(decay, (1 + num_updates) / (10 + num_updates)) if warm else decay
    ema = ema - (1 - d) * (ema - p)
    return p, m, v, ema, num_updates
