"""Attention Matching: the specification, in plain PyTorch, and what runs on a CPU.

A long prefix of keys and values is replaced by few of its keys with new values, so that attention to them gives what
attention to all gave (Attention Matching, arXiv 2602.16284; the rule for which keys to keep, and the ridge of the
least squares, are the caller's). With queries q_i at positions p_i, keys k_j at positions p_j, values v_j, an optional
window w and an optional logit s of an attention sink (Xiao et al. 2023; one a head, without a value):

    z_ij  = cap(scale * q_i · k_j)   over the j that i sees: p_j <= p_i, p_i - p_j < w;  cap(z) = c tanh(z / c), or z
    lse_i = log(sum_j exp(z_ij) [+ exp(s)])
    a_ij  = exp(z_ij - lse_i)        0 over the j that i does not see

`attention_scores`, over all keys (the paper's score of a key is the root of the mean of a_ij^2):

    score_j = sum_i a_ij^2           y_i = sum_j a_ij v_j

`value_system`, over the kept keys, with X = a, their values V, and y the targets: the normal equations of the change
of the values, min |X (V + change) - y|^2:

    gram = X^T X                     residual = X^T (y - X V)

and lse over the kept keys: what that over all keys is above it is the logarithm of how much more mass all had.

Sums over i are over all queries of all query heads that share a key head. A query or key with a negative position does
not exist; what is stored there is not read, and may be NaN. A query that does not exist, or sees no key, has a_ij = 0,
y_i = 0 and lse_i = -inf, even where there is a sink. A key that does not exist has the score 0, and zeros in gram and
residual.

Shapes: query `[B, H, n, D]`, key and value `[B, KV, S, D]`, query_positions `[B, n]`, key_positions `[B, KV, S]`, and
sinks `[H]`. Everything is computed in float32 (float64 for float64). Row by row and key head by key head, what exists
is put together first. So a row of a padded batch gives bit for bit what it gives alone, and padding costs no time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .arguments import MatchingInputs, MatchingSettings

# Logits that are held at once: so many that a block of them stays in a core's cache.
_BLOCK = 2**19


def attention_scores(
    inputs: MatchingInputs, settings: MatchingSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the scores of the keys, and lse and y of the queries, by the formulas above.

    Args:
        inputs: Queries and keys.
        settings: Settings of the attention.

    Returns:
        `(scores, lse, y)`: `[B, KV, S]`, `[B, H, n]` and `[B, H, n, D]` in float32 (float64 for float64).
    """
    query, key = inputs.query, inputs.key
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = key.new_zeros(key.shape[:3], dtype=dtype)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
    output = query.new_zeros(query.shape, dtype=dtype)
    for pair in _pairs(inputs):
        found = pair.key.new_zeros(len(pair.key))
        lse_of_pair, output_of_pair = pair.empty_lines(), pair.empty_lines(query.shape[-1])
        for lines in _blocks(pair):
            weights, lse_of_pair[lines] = _weights(pair, lines, settings)
            output_of_pair[lines] = weights @ pair.value
            found += weights.square_().sum(0)
        scores[pair.row, pair.key_head, pair.keys] = found
        lse[pair.row, pair.heads, pair.queries] = lse_of_pair.view(-1, len(pair.queries))
        output[pair.row, pair.heads, pair.queries] = output_of_pair.view(-1, len(pair.queries), query.shape[-1])
    return scores, lse, output


def value_system(
    inputs: MatchingInputs, target: torch.Tensor, settings: MatchingSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute gram, residual and lse by the formulas above.

    Args:
        inputs: Queries and kept keys.
        target: y, `[B, H, n, D]`.
        settings: Settings of the attention.

    Returns:
        `(gram, residual, lse)`: `[B, KV, S, S]`, `[B, KV, S, D]` and `[B, H, n]` in float32 (float64 for float64).
    """
    query, key = inputs.query, inputs.key
    dtype = torch.promote_types(key.dtype, torch.float32)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
    gram = key.new_zeros((*key.shape[:3], key.shape[2]), dtype=dtype)
    residual = key.new_zeros(key.shape, dtype=dtype)
    for pair in _pairs(inputs):
        gram_of_pair = pair.key.new_zeros(len(pair.key), len(pair.key))
        residual_of_pair, lse_of_pair = torch.zeros_like(pair.key), pair.empty_lines()
        wanted = target[pair.row, pair.heads].index_select(1, pair.queries).flatten(0, 1).to(dtype)
        for lines in _blocks(pair):
            weights, lse_of_pair[lines] = _weights(pair, lines, settings)
            gram_of_pair.addmm_(weights.T, weights)
            missing = torch.addmm(wanted[lines], weights, pair.value, alpha=-1)
            residual_of_pair.addmm_(weights.T, missing)
        gram[pair.row, pair.key_head, pair.keys[:, None], pair.keys] = gram_of_pair
        residual[pair.row, pair.key_head, pair.keys] = residual_of_pair
        lse[pair.row, pair.heads, pair.queries] = lse_of_pair.view(-1, len(pair.queries))
    return gram, residual, lse


class _Pair(NamedTuple):
    """What exists of one key head of one row, and of the query heads that share it.

    Attributes:
        row: Index of the row.
        key_head: Index of the key head.
        heads: The query heads.
        queries: Indices of the queries that exist, `[m]`.
        keys: Indices of the keys that exist, `[s]`.
        query: `[lines, D]`: one line for each head and query, head by head.
        key: `[s, D]`.
        value: `[s, D]`.
        query_positions: `[lines]`.
        key_positions: `[s]`.
        sink: Logit of the sink of each line, `[lines]`; None for no sinks.
    """

    row: int
    key_head: int
    heads: slice
    queries: torch.Tensor
    keys: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    query_positions: torch.Tensor
    key_positions: torch.Tensor
    sink: torch.Tensor | None

    def empty_lines(self, *size: int) -> torch.Tensor:
        """Make an unwritten tensor `[lines, *size]`."""
        return self.query.new_empty(len(self.query), *size)


def _pairs(inputs: MatchingInputs) -> Iterator[_Pair]:
    """Go through the rows and key heads that have both queries and keys."""
    query, key, value, query_positions, key_positions, sinks = inputs
    dtype = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    for row in range(len(query)):
        queries = (query_positions[row] >= 0).nonzero()[:, 0]
        for key_head in range(key.shape[1]):
            keys = (key_positions[row, key_head] >= 0).nonzero()[:, 0]
            if not len(queries) or not len(keys):
                continue
            heads = slice(key_head * group, (key_head + 1) * group)
            # Indexed even where all exist: a copy of the same layout however much padding there was.
            yield _Pair(
                row,
                key_head,
                heads,
                queries,
                keys,
                query[row, heads].index_select(1, queries).flatten(0, 1).to(dtype),
                key[row, key_head].index_select(0, keys).to(dtype),
                value[row, key_head].index_select(0, keys).to(dtype),
                query_positions[row].index_select(0, queries).repeat(group),
                key_positions[row, key_head].index_select(0, keys),
                None if sinks is None else sinks[heads].to(dtype).repeat_interleave(len(queries)),
            )


def _blocks(pair: _Pair) -> Iterator[slice]:
    """Go through the lines of a pair, block by block."""
    size = max(1, _BLOCK // len(pair.key))
    for first in range(0, len(pair.query), size):
        yield slice(first, first + size)


def _weights(pair: _Pair, lines: slice, settings: MatchingSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a and lse of some lines of a pair: `[lines, s]` and `[lines]`."""
    logits = settings.scale * pair.query[lines] @ pair.key.T
    if settings.softcap is not None:
        logits.div_(settings.softcap).tanh_().mul_(settings.softcap)
    query_positions, key_positions = pair.query_positions[lines], pair.key_positions
    if not _all_visible(query_positions, key_positions, settings.window):
        hidden = key_positions > query_positions[:, None]
        if settings.window is not None:
            hidden |= key_positions <= query_positions[:, None] - settings.window
        logits.masked_fill_(hidden, -torch.inf)
    largest = logits.amax(1)
    blind = largest == -torch.inf
    weights = logits.softmax(1)
    # From the largest weight: exp and logsumexp are many times slower than softmax where exponentials underflow.
    lse = largest - weights.amax(1).log()
    if pair.sink is not None:
        with_sink = torch.logaddexp(lse, pair.sink[lines])
        weights.mul_(torch.exp(lse - with_sink)[:, None])
        lse = with_sink
    if blind.any():  # NaN so far
        weights[blind] = 0.0
        lse[blind] = -torch.inf
    return weights, lse


def _all_visible(query_positions: torch.Tensor, key_positions: torch.Tensor, window: int | None) -> bool:
    """Tell, without looking at every pair, that every query sees every key; False where it takes a mask to tell."""
    if key_positions.max() > query_positions.min():
        return False
    return window is None or bool(query_positions.max() - key_positions.min() < window)
