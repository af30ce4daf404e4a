"""Rules that take the sign of something."""

from optforge import exp, log, maximum, mean, minimum, rule, sign, sqrt, where


@rule
def lion(p, g, m=0.0, *, lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.0, cautious=False):
    """Lion: the sign of one average of gradients, with another kept (Chen et al., 2023); cautious as Liang et al., 2024."""
    assert lr >= 0 and 0 <= beta1 <= 1 and 0 <= beta2 <= 1
    p = p * (1 - lr * weight_decay)
    update = sign(beta1 * m + (1 - beta1) * g)
    if cautious:
        mask = where(update * g > 0, 1, 0)
        update = update * mask / maximum(mean(mask), 1e-3)
    p = p - lr * update
    m = beta2 * m + (1 - beta2) * g
    return p, m


@rule
def tiger(p, g, m=0.0, *, t, lr=1e-3, beta=0.965, weight_decay=0.01, relative_lr=False, shrink=0.0):
    """Tiger: Lion with one average; bert4keras has it with a rate relative to the rms of p (Su, 2023)."""
    assert 0 <= beta < 1 and 0 <= shrink < 1
    m = beta * m + (1 - beta) * g
    update = (sign(m) + weight_decay * p) * lr
    if relative_lr:
        rms = sqrt(mean(p**2))
        update = update * rms if rms > 0 else update
    p = p * (1 - shrink) - update if t > 1 else p - update
    return p, m


@rule
def signum(p, g, buf=0.0, *, lr=0.01, momentum=0.9, weight_decay=0.0, plain=False):
    """Signum, and signSGD where plain: the sign of the momentum, or of the gradient (Bernstein et al., ICML 2018)."""
    assert lr >= 0 and 0 <= momentum < 1 and weight_decay >= 0
    g = g + weight_decay * p
    if plain:
        p = p - lr * sign(g)
    else:
        buf = momentum * buf + (1 - momentum) * g
        p = p - lr * sign(buf)
    return p, buf


@rule
def powersign(p, g, m=0.0, *, t, lr=0.1, base=2.718281828459045, beta=0.9, decay_steps=1000, sign_decay="none"):
    """PowerSign: base^(f(t)·sign(g)·sign(m))·g (Bello et al., ICML 2017)."""
    assert base > 0 and 0 <= beta < 1 and decay_steps > 0
    if sign_decay == "linear":
        f = maximum(1 - t / decay_steps, 0)
    elif sign_decay == "restart":
        f = 1 - t % decay_steps / decay_steps
    else:
        f = 1
    m = beta * m + (1 - beta) * g
    ln_base = log(base)
    p = p - lr * exp(f * ln_base * sign(g) * sign(m)) * g
    return p, m


@rule
def addsign(p, g, m=0.0, *, t, lr=0.1, alpha=1.0, beta=0.9, decay_steps=1000, sign_decay="none"):
    """AddSign: (α + f(t)·sign(g)·sign(m))·g (Bello et al., ICML 2017)."""
    assert 0 <= beta < 1 and decay_steps > 0
    if sign_decay == "linear":
        f = maximum(1 - t / decay_steps, 0)
    elif sign_decay == "restart":
        f = 1 - t % decay_steps / decay_steps
    else:
        f = 1
    m = m * beta + (1 - beta) * g
    p = p - lr * (alpha + f * sign(g) * sign(m)) * g
    return p, m


@rule
def irprop(p, g, g_prev=0.0, Δ="delta_0", Δw=0.0, *, delta_0=0.1, η_plus=1.2, η_minus=0.5, delta_max=50.0,
           delta_min=1e-6, backtracking=False):  # fmt: skip
    """Rprop without weight-backtracking (iRprop−) and with it (Rprop+) (Igel and Hüsken, 2000)."""
    assert 0 < η_minus < 1 < η_plus and 0 < delta_min <= delta_max
    s = g * g_prev
    Δ = where(s > 0, minimum(Δ * η_plus, delta_max), where(s < 0, maximum(Δ * η_minus, delta_min), Δ))
    if backtracking:
        Δw = where(s >= 0, -sign(g) * Δ, -Δw)
        g_prev = where(s < 0, 0, g)
    else:
        g = where(s < 0, 0, g)
        Δw = -sign(g) * Δ
        g_prev = g
    p = p + Δw
    return p, g_prev, Δ, Δw
