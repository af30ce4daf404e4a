from optforge import norm, rule, sqrt


@rule
def lamb(p, g, m=0.0, v=0.0, *, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=0.01):
    """LAMB: Adam's step with weight decay, for each tensor as long as the tensor's own norm.

    m ← beta1·m + (1 − beta1)·g;  v ← beta2·v + (1 − beta2)·g²;
    u = (m / (1 − beta1^t)) / (√(v / (1 − beta2^t)) + eps) + weight_decay·p;  p ← p − lr·(‖p‖ / ‖u‖)·u,
    where the ratio is 1 if either norm is 0

    lr: learning rate. beta1, beta2: decay of the first and second moment. eps: added to the root of the
    corrected second moment. weight_decay: share of the parameter in the step.

    You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020.
    """
    assert 0 <= beta1 < 1 and 0 <= beta2 < 1 and eps >= 0 and weight_decay >= 0
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    update = (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps) + weight_decay * p
    p_norm = norm(p)
    update_norm = norm(update)
    trust = p_norm / update_norm if p_norm > 0 and update_norm > 0 else 1
    p = p - lr * trust * update
    return p, m, v
