"""New tensors for the results of an attention, in the layout that the next layer wants."""

import torch


def new_output(query: torch.Tensor) -> torch.Tensor:
    """Make the output: an unwritten tensor in which the heads of a token lie side by side.

    Args:
        query: `[B, Hq, T, D]`, or `[total, Hq, D]`.

    Returns:
        A tensor of the shape, dtype and device of `query`.
    """
    if query.dim() == 3:
        return torch.empty_like(query, memory_format=torch.contiguous_format)
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)


def new_lse(query: torch.Tensor) -> torch.Tensor:
    """Make the log-sum-exps: an unwritten tensor in float32, or float64 for a float64 query.

    Args:
        query: `[B, Hq, T, D]`, or `[total, Hq, D]`.

    Returns:
        `[B, Hq, T]`, or `[Hq, total]`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    shape = query.shape[:-1] if query.dim() == 4 else (query.shape[1], query.shape[0])
    return query.new_empty(shape, dtype=dtype)
