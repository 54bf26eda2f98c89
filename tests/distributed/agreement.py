"""How far two trainings that should be the same are apart."""


def gap(one, other):
    """Largest difference between two groups of tensors, relative to the largest value of the group."""
    assert one.keys() == other.keys()
    scale = max(tensor.double().abs().max().item() for tensor in one.values())
    return max((one[key].double() - other[key].double()).abs().max().item() for key in one) / scale


def parameters(state, start=None):
    """Without buffers that count or hold indices; with `start`, how far they have moved."""
    return {
        key: tensor.double() - (start[key].double() if start else 0)
        for key, tensor in state.items()
        if tensor.is_floating_point()
    }


def series(result, *keys):
    """Values of logged keys, in the order they were logged."""
    return [[entry[key] for entry in result["log"] if key in entry] for key in keys]


DECISIONS = ("learning_rate", "next_learning_rate", "reload")
SCALARS = ("lambda1", "lambda2", "train_natural_route_accuracy")
METRICS = ("eval_robust_accuracy", "eval_natural_accuracy", "eval_natural_route_accuracy")
LOSSES = ("loss", "natural_loss", "robust_loss", "kl", "eval_loss", "grad_norm")
