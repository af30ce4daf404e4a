"""Momentum in its many forms, averages of weights, and arithmetic that compensates."""

from optforge import max_abs, maximum, rule, scalar, sqrt


@rule
def qhm(p, g, d=0.0, *, lr=0.1, beta=0.999, nu=0.7, weight_decay=0.0, decouple=False):
    """QHM: (1 − ν)·g + ν·d, a mixture of gradient and momentum (Ma and Yarats, ICLR 2019)."""
    assert lr >= 0 and 0 <= beta < 1
    if decouple:
        p = p * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * p
    d = beta * d + (1 - beta) * g
    p = p - lr * ((1 - nu) * g + nu * d)
    return p, d


@rule
def aggmo(p, g, buf_1=0.0, buf_2=0.0, buf_3=0.0, *, lr=0.1, beta_1=0.0, beta_2=0.9, beta_3=0.99, weight_decay=0.0):
    """AggMo: the mean of three momenta (Lucas et al., ICLR 2019)."""
    assert 0 <= beta_1 < 1 and 0 <= beta_2 < 1 and 0 <= beta_3 < 1
    g = g + weight_decay * p
    K = 3
    buf_1 = beta_1 * buf_1 + g
    p = p - lr / K * buf_1
    buf_2 = beta_2 * buf_2 + g
    p = p - lr / K * buf_2
    buf_3 = beta_3 * buf_3 + g
    p = p - lr / K * buf_3
    return p, buf_1, buf_2, buf_3


@rule
def pid(p, g, last=0.0, I=0.0, D=0.0, *, t, lr=0.1, momentum=0.9, dampening=0.0, integral=5.0, derivative=10.0,
        weight_decay=0.0):  # fmt: skip
    """The PID optimizer: g, its sum and its change, as a controller takes an error (An et al., CVPR 2018)."""
    assert 0 <= momentum < 1
    g = g + weight_decay * p
    P = g
    I = momentum * I + (1 - dampening) * g if t > 1 else g
    D = momentum * D + (1 - momentum) * (g - last) if t > 1 else 0 * g
    last = g
    p = p - lr * (P + integral * I + derivative * D)
    return p, last, I, D


@rule
def accsgd(p, g, buf="p", *, lr=1e-3, kappa=1000.0, xi=10.0, small_const=0.7, weight_decay=0.0):
    """AccSGD: a long step beside a short one (Kidambi et al., ICLR 2018)."""
    assert kappa >= 1 and 1 <= xi <= sqrt(kappa) and 0 < small_const < 1
    large_lr = lr * kappa / small_const
    Alpha = 1 - (small_const * small_const * xi) / kappa
    Beta = 1 - Alpha
    zeta = small_const / (small_const + Beta)
    g = g + weight_decay * p
    buf = (1 / Beta - 1) * buf
    buf = buf - large_lr * g
    buf = buf + p
    buf = Beta * buf
    p = p - lr * g
    p = zeta * p + (1 - zeta) * buf
    return p, buf


@rule
def schedule_free_sgd(p, g, z="p", weight_sum: scalar = 0.0, lr_max: scalar = -1.0, *, t, lr=1.0, momentum=0.9,
                      weight_decay=0.0, warmup_steps=0.0, r=0.0, weight_lr_power=2.0):  # fmt: skip
    """Schedule-free SGD: p is y, between z and their average x (Defazio et al., NeurIPS 2024)."""
    assert 0 < momentum < 1 and warmup_steps >= 0
    sched = t / warmup_steps if t < warmup_steps else 1.0
    γ = lr * sched
    lr_max = maximum(γ, lr_max)
    weight = t**r * lr_max**weight_lr_power
    weight_sum = weight_sum + weight
    ckp1 = weight / weight_sum if weight_sum != 0 else 0.0
    g = g + weight_decay * p
    p = p + ckp1 * (z - p)
    p = p + γ * (momentum * (1 - ckp1) - 1) * g
    z = z - γ * g
    return p, z, weight_sum, lr_max


@rule
def schedule_free_adamw(p, g, z="p", exp_avg_sq=0.0, weight_sum: scalar = 0.0, lr_max: scalar = -1.0, *, t, lr=2.5e-3,
                        beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, warmup_steps=0.0, r=0.0,
                        weight_lr_power=2.0):  # fmt: skip
    """Schedule-free AdamW: y moves by interpolation to z and by Adam's normalised gradient (Defazio et al., 2024)."""
    assert 0 < beta1 < 1 and 0 <= beta2 < 1 and warmup_steps >= 0
    sched = t / warmup_steps if t < warmup_steps else 1.0
    lr_t = lr * sched
    lr_max = maximum(lr_t, lr_max)
    weight = t**r * lr_max**weight_lr_power
    weight_sum = weight_sum + weight
    ckp1 = weight / weight_sum if weight_sum != 0 else 0.0
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g**2
    denom = sqrt(exp_avg_sq / (1 - beta2**t)) + eps
    g = g / denom + weight_decay * p
    p = (1 - ckp1) * p + ckp1 * z
    p = p + lr_t * (beta1 * (1 - ckp1) - 1) * g
    z = z - lr_t * g
    return p, z, exp_avg_sq, weight_sum, lr_max


@rule
def lookahead_adam(p, g, m=0.0, v=0.0, φ="p", *, t, lr=1e-3, β1=0.9, β2=0.999, ε=1e-8, k=5, α=0.5, pullback="none"):
    """Lookahead around Adam: at every k-th step slow weights follow, and fast ones begin there (Zhang et al., 2019)."""
    assert k >= 1 and 0 <= α <= 1
    m = β1 * m + (1 - β1) * g
    v = β2 * v + (1 - β2) * g**2
    p = p - lr * (m / (1 - β1**t)) / (sqrt(v / (1 - β2**t)) + ε)
    synchronised = t % k == 0
    φ = φ + α * (p - φ) if synchronised else φ
    p = φ if synchronised else p
    if pullback == "reset":
        m = 0 * m if synchronised else m
    return p, m, v, φ


@rule
def polyak_sgd(p, g, ā="p", *, t, lr=0.1, start=10):
    """SGD beside the running mean of its weights from a step on (Polyak and Juditsky, 1992)."""
    assert lr > 0 and start >= 0
    p = p - lr * g
    n = t - start
    ā = ā + (p - ā) / n if n >= 1 else p
    return p, ā


@rule
def kahan_adamw(p, g, m=0.0, v=0.0, kahan_comp=0.0, *, t, lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=1e-2):
    """AdamW with Kahan's compensation, which keeps what the parameter's rounding lost."""
    lr_t = lr / (1 - beta1**t)
    p = p * (1 - lr * weight_decay)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    kahan_comp = kahan_comp - lr_t * m / (sqrt(v / (1 - beta2**t)) + eps)
    prev = p
    p = p + kahan_comp
    kahan_comp = kahan_comp + (prev - p)
    return p, m, v, kahan_comp


@rule
def gravity(p, g, v=0.0, *, t, lr=0.1, beta=0.9):
    """Gravity: gradients bent by 1 + (g / max|g|)², under an average whose weight grows (Bahrami and Zadeh, 2021)."""
    assert 0 <= beta < 1
    beta_hat = (beta * t + 1) / (t + 2)
    m = 1 / max_abs(g)
    zeta = g / (1 + (g / m) ** 2)
    v = beta_hat * v + (1 - beta_hat) * zeta
    p = p - lr * v
    return p, v
