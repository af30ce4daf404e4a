from optforge import mean, transform


@transform
def centralize(g):
    """Take the mean of each tensor's gradient away from it.

    g ← g − (Σ g over the tensor) / n

    The mean is that of the whole tensor, in double; the paper's is that of each output neuron, which for a vector of
    weights is the same.

    Yong et al., "Gradient Centralization: A New Optimization Technique for Deep Neural Networks", ECCV 2020.
    """
    g = g - mean(g)
    return g
