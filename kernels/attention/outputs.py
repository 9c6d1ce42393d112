"""The tensors that attention writes, in the layout that what follows wants."""

import torch


def new_output(query):
    """A new tensor of the query's shape, with a token's heads side by side, as layers after an attention want it."""
    if query.dim() == 3:
        return torch.empty_like(query, memory_format=torch.contiguous_format)
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)


def new_lse(query):
    """float32 `[B, Hq, T]`, or `[Hq, total]`; float64 for float64."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    shape = query.shape[:-1] if query.dim() == 4 else (query.shape[1], query.shape[0])
    return query.new_empty(shape, dtype=dtype)
