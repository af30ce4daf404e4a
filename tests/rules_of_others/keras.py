"""Optimizers of Keras and TensorFlow, where they differ from those of the same name elsewhere."""

from optforge import abs, global_norm, maximum, minimum, norm, rule, sign, sqrt, where


@rule
def keras_rmsprop(p, g, velocity=0.0, average_gradient=0.0, mom=0.0, *, learning_rate=0.001, rho=0.9, momentum=0.0,
                  epsilon=1e-7, centered=False, with_momentum=False):  # fmt: skip
    """RMSprop of Keras: ε within the root, the rate within the momentum."""
    assert 0 <= rho < 1 and 0 <= momentum <= 1
    velocity = rho * velocity + (1 - rho) * g**2
    if centered:
        average_gradient = rho * average_gradient + (1 - rho) * g
        denominator = velocity - average_gradient**2 + epsilon
    else:
        denominator = velocity + epsilon
    increment = learning_rate * g / sqrt(denominator)
    if with_momentum:
        mom = momentum * mom + increment
        p = p - mom
    else:
        p = p - increment
    return p, velocity, average_gradient, mom


@rule
def keras_ftrl(p, g, accum="initial_accumulator_value", linear=0.0, *, learning_rate=0.001, learning_rate_power=-0.5,
               initial_accumulator_value=0.1, l1=0.0, l2=0.0, l2_shrinkage=0.0, beta=0.0):  # fmt: skip
    """FTRL of Keras at its power −½, with shrinkage and β (McMahan et al., KDD 2013)."""
    assert initial_accumulator_value >= 0 and learning_rate_power == -0.5 and l1 >= 0 and l2 >= 0 and l2_shrinkage >= 0
    l2_reg = l2 + beta / (2 * learning_rate)
    grad_to_use = g + 2 * l2_shrinkage * p
    new_accum = accum + g**2
    linear = linear + (grad_to_use - (sqrt(new_accum) - sqrt(accum)) / learning_rate * p)
    quadratic = sqrt(new_accum) / learning_rate + 2 * l2_reg
    linear_clipped = minimum(maximum(linear, -l1), l1)
    p = (linear_clipped - linear) / quadratic
    accum = new_accum
    return p, accum, linear


@rule
def ftrl_proximal(p, g, n=0.0, z=0.0, *, α=0.1, β=1.0, λ1=0.5, λ2=1.0):
    """FTRL-Proximal as in its paper: w is 0 where |z| ≤ λ1 (McMahan et al., KDD 2013)."""
    assert α > 0 and β >= 0 and λ1 >= 0 and λ2 >= 0
    σ = (sqrt(n + g**2) - sqrt(n)) / α
    z = z + g - σ * p
    n = n + g**2
    p = where(abs(z) <= λ1, 0, -(z - sign(z) * λ1) / ((β + sqrt(n)) / α + λ2))
    return p, n, z


@rule
def tf_rmsprop(p, g, ms=1.0, mg=0.0, mom=0.0, *, lr=0.01, alpha=0.9, momentum=0.9, eps=1e-10, weight_decay=0.0,
               centered=False, decoupled_decay=False, lr_in_momentum=True):  # fmt: skip
    """RMSprop of TensorFlow 1, as timm keeps it: v begins at 1, ε is within the root."""
    assert alpha >= 0 and momentum > 0
    if decoupled_decay:
        p = p * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * p
    one_minus_alpha = 1 - alpha
    ms = ms + one_minus_alpha * (g * g - ms)
    if centered:
        mg = mg + one_minus_alpha * (g - mg)
        avg = sqrt(ms - mg**2 + eps)
    else:
        avg = sqrt(ms + eps)
    mom = momentum * mom + (lr * g / avg if lr_in_momentum else g / avg)
    p = p - mom if lr_in_momentum else p - lr * mom
    return p, ms, mg, mom


@rule
def keras_lion(p, g, m=0.0, *, learning_rate=1e-3, beta_1=0.9, beta_2=0.99, weight_decay=0.0):
    """Lion of Keras, under its decoupled decay."""
    assert 0 < beta_1 <= 1
    p = p - p * weight_decay * learning_rate
    c = m * beta_1 + g * (1 - beta_1)
    p = p - learning_rate * sign(c)
    m = m * beta_2 + g * (1 - beta_2)
    return p, m


@rule
def keras_adam(p, g, m=0.0, v=0.0, v_hat=0.0, *, t, learning_rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7,
               clipvalue=1.0, global_clipnorm=1.0, amsgrad=False, clip="none"):  # fmt: skip
    """Adam of Keras: both corrections in the rate, ε beside the uncorrected root, and Keras' ways of clipping."""
    assert 0 <= beta_1 < 1 and 0 <= beta_2 < 1
    if clip == "value":
        g = minimum(maximum(g, -clipvalue), clipvalue)
    elif clip == "global":
        use_norm = global_norm(g)
        g = g * global_clipnorm / maximum(use_norm, global_clipnorm)
    elif clip == "norm":
        use_norm = norm(g)
        g = g * global_clipnorm / maximum(use_norm, global_clipnorm)
    alpha = learning_rate * sqrt(1 - beta_2**t) / (1 - beta_1**t)
    m = m + (g - m) * (1 - beta_1)
    v = v + (g**2 - v) * (1 - beta_2)
    if amsgrad:
        v_hat = maximum(v_hat, v)
        v = v_hat
    p = p - m * alpha / (sqrt(v) + epsilon)
    return p, m, v, v_hat
