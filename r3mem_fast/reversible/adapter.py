"""The paper's adapter G: a small network between the two streams of a reversible layer."""

import torch
from torch import nn

# Its name among a layer's submodules.
ADAPTER = "reversible_adapter"


class BottleneckAdapter(nn.Module):
    """The adapter `G(v) = W_up silu(W_down v)` of a layer (R3Mem, section 3; MEFT, section 3.2).

    It runs in the dtype of its weights, whatever autocast says, so that it gives the same bits in a backward pass.
    `W_up` is zero at first, so that it changes nothing.

    Args:
        width: Width of the streams.
        rank: Width of the bottleneck.
        device: Device of the weights.
        dtype: Dtype of the weights.
    """

    def __init__(self, width: int, rank: int, *, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, width, bias=False, device=device, dtype=dtype)
        nn.init.zeros_(self.up.weight)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        """Compute what is added to the other stream.

        Args:
            stream: A stream, converted to a float, `[B, T, width]`.

        Returns:
            A tensor of the same shape, in the dtype of the weights.
        """
        with torch.autocast(stream.device.type, enabled=False):
            return self.up(nn.functional.silu(self.down(stream.to(self.down.weight.dtype))))
