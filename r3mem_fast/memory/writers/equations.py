"""Solves what matching asks for: changes of values by ridge regression, and moves of keys. See `matching`."""

import torch

# Lambda and epsilon. Text behind a memory is read as well, within 0.002 nats a token, with 0.1 to 1 and 0 to 0.1; the
# largest changes of values are four times smaller with an epsilon of 0.1 than with none.
_RIDGE, _RIDGE_OF_ALL = 0.3, 0.1
# Ridge of the direction, as a share of the mean of the diagonal.
_DIRECTION_RIDGE = 1e-3


def without(gram: torch.Tensor, residual: torch.Tensor, pinned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The equations without the values of pinned slots, whose change comes out as 0.

    Args:
        gram: See `solved`.
        residual: See `solved`.
        pinned: Which slots are pinned, bool `[B, kv_heads, t]`.
    """
    gram = gram.masked_fill(pinned[..., None] | pinned[..., None, :], 0)
    return gram, residual.masked_fill(pinned[..., None], 0)


def move_for_mass(query: torch.Tensor, missing: torch.Tensor, key_heads: int, scale: float) -> torch.Tensor:
    """How keys move so that logits gain, on average over queries, what is missing; zero where that cannot be computed.

    Args:
        query: `[B, H, n, D]`.
        missing: What the logits of each query are to gain, the logarithm of a mass, `[B, H, n]`; not finite where a
            query does not count.
        key_heads: Number of key heads.
        scale: Factor of the products of queries and keys.

    Returns:
        float32 `[B, key_heads, D]`, for all keys of a head.
    """
    with torch.autocast(query.device.type, enabled=False):
        missing = missing.float().reshape(len(missing), key_heads, -1)
        counts = missing.isfinite()
        number = counts.sum(-1, keepdim=True).clamp_min(1)
        gain = missing.masked_fill(~counts, 0).sum(-1, keepdim=True) / number
        asked = query.reshape(*missing.shape, query.shape[-1]).float().masked_fill(~counts[..., None], 0)
        gram = asked.mT @ asked
        ridge = _DIRECTION_RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1) + torch.finfo(gram.dtype).tiny
        eye = torch.eye(gram.shape[-1], device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(gram + ridge[..., None, None] * eye)
        move = gain / scale * torch.cholesky_solve(asked.sum(2)[..., None], factor)[..., 0]
        right = (failed == 0)[..., None] & move.isfinite().all(-1, keepdim=True)
        return torch.where(right, move, 0.0)


def solved(gram: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve for the change of kept values by ridge regression; zero where the equations cannot be solved.

    Args:
        gram: `X^T X`, `[B, kv_heads, t, t]`; no element is negative.
        residual: `X^T (y - X V)`, `[B, kv_heads, t, head_dim]`.

    Returns:
        The change, float32, the shape of `residual`, and where it could be had, bool `[B, kv_heads]`.
    """
    with torch.autocast(gram.device.type, enabled=False):
        return _solved(gram, residual)


def _solved(gram, residual):
    finite = gram.isfinite().all(-1).all(-1)[..., None, None]
    gram = torch.where(finite, gram.float(), torch.eye(gram.shape[-1], device=gram.device))
    asked = gram.diagonal(dim1=-2, dim2=-1)
    ridge = _RIDGE * (asked + _RIDGE_OF_ALL * asked.mean(-1, keepdim=True)) + torch.finfo(gram.dtype).tiny
    factor, failed = torch.linalg.cholesky_ex(gram + ridge.diag_embed())
    change = torch.cholesky_solve(residual.float(), factor)
    right = finite & (failed == 0)[..., None, None] & change.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    return torch.where(right, change, 0.0), right[..., 0, 0]
