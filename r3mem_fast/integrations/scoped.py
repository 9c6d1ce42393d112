"""Changes to a module that are undone: evaluation mode, and parameters as they were."""

import contextlib

import torch


@contextlib.contextmanager
def evaluating(module):
    """Evaluation mode while this lasts; then every part is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextlib.contextmanager
def unchanged_on_failure(model):
    """If what is done meanwhile is interrupted, or fails, trainable parameters are as before."""
    before = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        raise
