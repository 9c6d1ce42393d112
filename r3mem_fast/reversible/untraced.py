"""`untraced`: functions that run as they are where torch.compile compiles a whole model."""

import functools
from typing import Any

import torch

_REASON = (
    "reversible layers carry state beside the hidden state, and run as they are: call torch.compile without "
    "fullgraph, or compile_layers(model), which compiles what each layer computes in training"
)
# A decorator. The reason stands in the errors and logs of torch.compile.
untraced: Any = functools.partial(torch.compiler.disable, reason=_REASON)
