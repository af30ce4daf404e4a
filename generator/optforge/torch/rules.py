"""The formulas of torch.optim as rules, operation by operation: what PyTorch computes, in one pass."""

from __future__ import annotations

from optforge import abs, maximum, minimum, rule, scalar, sign, sqrt, where

__all__ = ["adadelta", "adagrad", "adam", "adamax", "asgd", "nadam", "radam", "rmsprop", "rprop", "sgd"]


@rule
def sgd(p, g, momentum_buffer=0.0, *, t, lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0,
        nesterov=False, maximize=False, with_momentum=False):  # fmt: skip
    """SGD of PyTorch: the first velocity is the first gradient itself, and dampening begins with the second.

    g ← g + weight_decay·p;  b ← momentum·b + (1 − dampening)·g;  p ← p − lr·b, with `nesterov` p − lr·(g + momentum·b)
    """
    assert lr >= 0
    assert momentum >= 0 and weight_decay >= 0
    if maximize:
        g = -g
    g = g + weight_decay * p
    if with_momentum:
        momentum_buffer = momentum * momentum_buffer + (1 - dampening) * g if t > 1 else g
        g = g + momentum * momentum_buffer if nesterov else momentum_buffer
    p = p - lr * g
    return p, momentum_buffer


@rule
def adam(p, g, exp_avg=0.0, exp_avg_sq=0.0, max_exp_avg_sq=0.0, *, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8,
         weight_decay=0.0, amsgrad=False, maximize=False, decoupled_weight_decay=False):  # fmt: skip
    """Adam and AdamW of PyTorch: m / (√v / √(1 − β2^t) + ε), with AMSGrad's maximum before the correction.

    Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015; Loshchilov and Hutter, "Decoupled Weight
    Decay Regularization", ICLR 2019; Reddi, Kale and Kumar, "On the Convergence of Adam and Beyond", ICLR 2018.
    """
    assert lr >= 0
    assert eps >= 0 and weight_decay >= 0
    assert 0 <= beta1 < 1 and 0 <= beta2 < 1
    if maximize:
        g = -g
    if decoupled_weight_decay:
        p = p * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * p
    exp_avg = exp_avg + (1 - beta1) * (g - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g * g
    step_size = lr / (1 - beta1**t)
    if amsgrad:
        max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
        denom = sqrt(max_exp_avg_sq) / sqrt(1 - beta2**t) + eps
    else:
        denom = sqrt(exp_avg_sq) / sqrt(1 - beta2**t) + eps
    p = p - step_size * exp_avg / denom
    return p, exp_avg, exp_avg_sq, max_exp_avg_sq


@rule
def nadam(p, g, exp_avg=0.0, exp_avg_sq=0.0, mu_product: scalar = 1.0, *, t, lr=2e-3, beta1=0.9, beta2=0.999,
          eps=1e-8, weight_decay=0.0, momentum_decay=4e-3, decoupled_weight_decay=False, maximize=False):  # fmt: skip
    """NAdam of PyTorch: μ_t = β1·(1 − ½·0.96^(t·ψ)), a product of all μ so far, and one μ ahead.

    Dozat, "Incorporating Nesterov Momentum into Adam", ICLR workshop 2016.
    """
    assert lr >= 0
    assert eps >= 0 and weight_decay >= 0 and momentum_decay >= 0
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
    exp_avg = exp_avg + (1 - beta1) * (g - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g * g
    denom = sqrt(exp_avg_sq / (1 - beta2**t)) + eps
    p = p - lr * (1 - mu) / (1 - mu_product) * g / denom
    p = p - lr * mu_next / (1 - mu_product * mu_next) * exp_avg / denom
    return p, exp_avg, exp_avg_sq, mu_product


@rule
def radam(p, g, exp_avg=0.0, exp_avg_sq=0.0, *, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0,
          decoupled_weight_decay=False, maximize=False):  # fmt: skip
    """RAdam of PyTorch: m̂ alone while ρ_t ≤ 5, then r_t·m̂·√(1 − β2^t) / (√v + ε).

    Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", ICLR 2020.
    """
    assert lr >= 0
    assert eps >= 0 and weight_decay >= 0
    assert 0 <= beta1 < 1 and 0.6 < beta2 < 1
    if maximize:
        g = -g
    if decoupled_weight_decay:
        p = p * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * p
    exp_avg = exp_avg + (1 - beta1) * (g - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g * g
    corrected = exp_avg / (1 - beta1**t)
    rho_inf = 2 / (1 - beta2) - 1
    rho_t = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    rect = sqrt(maximum(((rho_t - 4) * (rho_t - 2) * rho_inf) / ((rho_inf - 4) * (rho_inf - 2) * rho_t), 0))
    adaptive = sqrt(1 - beta2**t) / (sqrt(exp_avg_sq) + eps)
    p = p - lr * corrected * adaptive * rect if rho_t > 5 else p - lr * corrected
    return p, exp_avg, exp_avg_sq


@rule
def adamax(p, g, exp_avg=0.0, exp_inf=0.0, *, t, lr=2e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0,
           maximize=False):  # fmt: skip
    """Adamax of PyTorch: u = max(β2·u, |g| + ε), p − lr / (1 − β1^t)·m / u.

    Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015.
    """
    assert lr >= 0
    assert eps >= 0 and weight_decay >= 0
    assert 0 <= beta1 < 1 and 0 <= beta2 < 1
    if maximize:
        g = -g
    g = g + weight_decay * p
    exp_avg = exp_avg + (1 - beta1) * (g - exp_avg)
    exp_inf = maximum(beta2 * exp_inf, abs(g) + eps)
    clr = lr / (1 - beta1**t)
    p = p - clr * exp_avg / exp_inf
    return p, exp_avg, exp_inf


@rule
def adagrad(p, g, sum_="initial_accumulator_value", *, t, lr=1e-2, lr_decay=0.0, weight_decay=0.0,
            initial_accumulator_value=0.0, eps=1e-10, maximize=False):  # fmt: skip
    """Adagrad of PyTorch: rate lr / (1 + (t − 1)·lr_decay) over √Σg² + ε.

    Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", JMLR 2011.
    """
    assert lr >= 0
    assert lr_decay >= 0 and weight_decay >= 0 and initial_accumulator_value >= 0 and eps >= 0
    if maximize:
        g = -g
    g = g + weight_decay * p
    clr = lr / (1 + (t - 1) * lr_decay)
    sum_ = sum_ + g * g
    p = p - clr * g / (sqrt(sum_) + eps)
    return p, sum_


@rule
def adadelta(p, g, square_avg=0.0, acc_delta=0.0, *, lr=1.0, rho=0.9, eps=1e-6, weight_decay=0.0, maximize=False):
    """Adadelta of PyTorch: √(Δ + ε) / √(v + ε)·g.

    Zeiler, "ADADELTA: An Adaptive Learning Rate Method", arXiv:1212.5701, 2012.
    """
    assert lr >= 0
    assert 0 <= rho <= 1 and eps >= 0 and weight_decay >= 0
    if maximize:
        g = -g
    g = g + weight_decay * p
    square_avg = rho * square_avg + (1 - rho) * g * g
    delta = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * g
    acc_delta = rho * acc_delta + (1 - rho) * delta * delta
    p = p - lr * delta
    return p, square_avg, acc_delta


@rule
def rmsprop(p, g, square_avg=0.0, grad_avg=0.0, momentum_buffer=0.0, *, lr=1e-2, alpha=0.99, eps=1e-8,
            weight_decay=0.0, momentum=0.0, centered=False, maximize=False, with_momentum=False):  # fmt: skip
    """RMSprop of PyTorch: g / (√v + ε), or √(v − ḡ²) where `centered`, through a buffer where there is momentum.

    Tieleman and Hinton, "Lecture 6.5: rmsprop", COURSERA: Neural Networks for Machine Learning, 2012.
    """
    assert lr >= 0
    assert eps >= 0 and momentum >= 0 and weight_decay >= 0 and alpha >= 0
    if maximize:
        g = -g
    g = g + weight_decay * p
    square_avg = alpha * square_avg + (1 - alpha) * g * g
    if centered:
        grad_avg = grad_avg + (1 - alpha) * (g - grad_avg)
        avg = sqrt(square_avg - grad_avg * grad_avg)
    else:
        avg = sqrt(square_avg)
    avg = avg + eps
    if with_momentum:
        momentum_buffer = momentum * momentum_buffer + g / avg
        p = p - lr * momentum_buffer
    else:
        p = p - lr * g / avg
    return p, square_avg, grad_avg, momentum_buffer


@rule
def rprop(p, g, prev=0.0, step_size="lr", *, lr=1e-2, etaminus=0.5, etaplus=1.2, step_size_min=1e-6,
          step_size_max=50.0, maximize=False):  # fmt: skip
    """Rprop of PyTorch: every element has a step of its own, longer while its sign stays and shorter where it turns.

    Riedmiller and Braun, "A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP Algorithm", 1993.
    """
    assert lr >= 0
    assert 0 < etaminus < 1 < etaplus and 0 < step_size_min <= step_size_max
    if maximize:
        g = -g
    s = g * prev
    factor = where(s > 0, etaplus, where(s < 0, etaminus, 1))
    step_size = minimum(maximum(step_size * factor, step_size_min), step_size_max)
    g = where(s < 0, 0, g)
    p = p - sign(g) * step_size
    prev = g
    return p, prev, step_size


@rule
def asgd(p, g, ax=0.0, eta: scalar = "lr", mu: scalar = 1.0, *, t, lr=1e-2, lambd=1e-4, alpha=0.75, t0=1e6,
         weight_decay=0.0, maximize=False):  # fmt: skip
    """ASGD of PyTorch: SGD with rate lr / (1 + λ·lr·t)^α, and the mean of what comes after t0.

    Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM J. Control Optim. 30, 1992.
    """
    assert lr >= 0
    assert lambd >= 0 and t0 >= 0 and weight_decay >= 0
    if maximize:
        g = -g
    g = g + weight_decay * p
    p = p * (1 - lambd * eta)
    p = p - eta * g
    ax = ax + (p - ax) * mu if mu != 1 else p
    eta = lr / (1 + lambd * lr * t) ** alpha
    mu = 1 / maximum(1, t - t0)
    return p, ax, eta, mu
