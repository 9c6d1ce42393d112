"""Inference mode of PyTorch, in which the streams still need ordinary tensors."""

import contextlib

import torch


@contextlib.contextmanager
def versioned_tensors():
    """Make ordinary tensors also in inference mode, whose own have no version to tell an in-place edit by."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
