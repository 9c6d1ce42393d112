"""Random cases of Attention Matching, and what results are held against: a loop in float64, and eager."""

import dataclasses
import math

import torch
from hypothesis import strategies as st

from r3mem_fast.kernels.matching.arguments import MatchingInputs, MatchingSettings


@dataclasses.dataclass(frozen=True)
class Case:
    """shared, group: key heads, and query heads a key head. ahead: how far queries are behind the keys; with 0 both
    end at about the same position. padding: share of queries and of keys that do not exist, in random places."""

    rows: int = 2
    shared: int = 1
    group: int = 1
    queries: int = 5
    keys: int = 7
    ahead: int = 0
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    query_padding: float = 0.0
    key_padding: float = 0.0
    poisoned: bool = True
    seed: int = 0

    def tensors(self, device="cpu"):
        """`(MatchingInputs, target)`: what does not exist is NaN, if `poisoned`."""
        generator = torch.Generator().manual_seed(self.seed)

        def values(*shape):
            return torch.randn(shape, generator=generator).to(self.dtype)

        def padding(positions, share):
            absent = torch.rand(positions.shape, generator=generator) < share
            return torch.where(absent, -1, positions).to(torch.int32)

        heads = self.shared * self.group
        # Heads of a token side by side, as a model's projections leave them.
        query = values(self.rows, self.queries, heads, self.head_dim).transpose(1, 2)
        key, value = (values(self.rows, self.keys, self.shared, self.head_dim).transpose(1, 2) for _ in range(2))
        target = torch.randn(query.shape, generator=generator).to(torch.promote_types(self.dtype, torch.float32))
        # Gaps, other ones for each key head, as kept keys leave them.
        gaps = torch.randint(1, 3, (self.rows, self.shared, self.keys), generator=generator)
        key_positions = gaps.cumsum(-1) - 1
        first = max(0, 3 * self.keys // 2 - self.queries + self.ahead)
        query_positions = torch.arange(first, first + self.queries).repeat(self.rows, 1)
        query_positions = padding(query_positions, self.query_padding)
        key_positions = padding(key_positions, self.key_padding)
        if self.poisoned:
            for tensor in (query, target):
                tensor.masked_fill_((query_positions < 0)[:, None, :, None], torch.nan)
            for tensor in (key, value):
                tensor.masked_fill_((key_positions < 0)[..., None], torch.nan)
        sinks = values(heads).float() if self.sinks else None
        found = (query, key, value, query_positions, key_positions, sinks, target)
        *inputs, target = (None if tensor is None else tensor.to(device) for tensor in found)
        return MatchingInputs(*inputs), target

    @property
    def settings(self):
        """As the implementations take them."""
        return MatchingSettings(self.head_dim**-0.5, self.softcap, self.window)


def cases(dtypes, most=40, **fixed):
    """A strategy: shapes that are and are no powers of two, grouped heads, from no padding to nothing else."""
    padding = st.sampled_from([0.0, 0.0, 0.3, 0.9, 1.0])
    strategies = {
        "rows": st.integers(1, 3),
        "shared": st.integers(1, 2),
        "group": st.sampled_from([1, 2, 3, 4, 8]),
        "queries": st.integers(1, most),
        "keys": st.integers(1, most),
        "ahead": st.sampled_from([0, 0, 1, 50]),
        "head_dim": st.sampled_from([8, 16, 64, 80, 96]),
        "dtype": st.sampled_from(dtypes),
        "window": st.sampled_from([None, None, 1, 5, 16, 100]),
        "softcap": st.sampled_from([None, None, 2.0, 30.0]),
        "sinks": st.booleans(),
        "query_padding": padding,
        "key_padding": padding,
        "seed": st.integers(0, 99),
    }
    strategies |= {name: st.just(value) for name, value in fixed.items()}
    return st.builds(Case, **strategies)


def exact_weights(inputs, settings):
    """a and lse, query by query and key by key, in float64: lists of numbers."""
    query, key, _, query_positions, key_positions, sinks = inputs
    rows, heads, queries, _ = query.shape
    group = heads // key.shape[1]
    weights = torch.zeros(rows, heads, queries, key.shape[2], dtype=torch.float64)
    lse = torch.full((rows, heads, queries), -torch.inf, dtype=torch.float64)
    for row in range(rows):
        asking = query_positions[row].tolist()
        for head in range(heads):
            places = key_positions[row, head // group].tolist()
            products = query[row, head].double() @ key[row, head // group].double().T
            for i, position in enumerate(asking):
                logits = {}
                for j, place in enumerate(places):
                    near = settings.window is None or position - place < settings.window
                    if 0 <= place <= position and near:
                        z = settings.scale * products[i, j].item()
                        logits[j] = (
                            z if settings.softcap is None else settings.softcap * math.tanh(z / settings.softcap)
                        )
                if not logits:
                    continue
                everything = [*logits.values()] + ([] if sinks is None else [sinks[head].item()])
                largest = max(everything)
                lse[row, head, i] = largest + math.log(math.fsum(math.exp(z - largest) for z in everything))
                for j, z in logits.items():
                    weights[row, head, i, j] = math.exp(z - lse[row, head, i].item())
    return weights, lse


def eager_weights(inputs, settings):
    """a and lse as models compute them: a mask tensor, products in the tensors' dtype, the softmax in float32."""
    query, key, _, query_positions, key_positions, sinks = inputs
    group = query.shape[1] // key.shape[1]
    logits = settings.scale * (query @ key.repeat_interleave(group, 1).transpose(-1, -2))
    if settings.softcap is not None:
        logits = settings.softcap * torch.tanh(logits / settings.softcap)
    own, theirs = query_positions[:, None, :, None], key_positions.repeat_interleave(group, 1)[:, :, None]
    seen = (theirs >= 0) & (theirs <= own)
    if settings.window is not None:
        seen = seen & (own - theirs < settings.window)
    logits = logits.float().masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks[None, :, None, None].expand(*logits.shape[:-1], 1).to(logits.dtype)
        logits = torch.cat([logits, column], -1)
    lse = logits.logsumexp(-1).masked_fill(~seen.any(-1), -torch.inf)
    weights = logits.softmax(-1)[..., : key.shape[2]].masked_fill(~seen, 0.0)
    return weights, lse


def clean(tensors):
    """With zeros in place of NaN, for what multiplies by a weight of 0 instead of leaving out."""
    inputs, target = tensors
    return MatchingInputs(*(None if tensor is None else torch.nan_to_num(tensor) for tensor in inputs)), (
        torch.nan_to_num(target)
    )


def by_key_head(tensor, key):
    """`[B, H, n, x]` as `[B, KV, H / KV * n, x]`."""
    return tensor.reshape(len(tensor), key.shape[1], -1, tensor.shape[-1])


def expected_scores(tensors, settings, eager=False):
    """`(scores, lse, y)` in float64 or eager."""
    inputs, _ = clean(tensors)
    weights, lse = (eager_weights if eager else exact_weights)(inputs, settings)
    values = inputs.value.to(inputs.query.dtype if eager else torch.float64)
    in_dtype = by_key_head(weights, values).to(values.dtype)
    scores = by_key_head(weights, values).square().sum(2)
    return scores, lse, (in_dtype @ values).reshape(inputs.query.shape)


def expected_system(tensors, settings, eager=False):
    """`(gram, residual, lse)` in float64 or eager."""
    inputs, target = clean(tensors)
    weights, lse = (eager_weights if eager else exact_weights)(inputs, settings)
    dtype = inputs.query.dtype if eager else torch.float64
    values = inputs.value.to(dtype)
    weights = by_key_head(weights, values).to(dtype)
    missing = by_key_head(target, values).to(dtype) - weights @ values
    return weights.transpose(-1, -2) @ weights, weights.transpose(-1, -2) @ missing, lse


def assert_within_budget(ours, exact, eager, what, factor=2, floor=2e-6):
    """|ours - exact| <= factor * |eager - exact|, largest errors, and a little for rounding where eager has none."""
    assert ours.shape == exact.shape, what
    finite = exact.isfinite()
    assert torch.equal(ours.isfinite(), finite.to(ours.device)), what
    if not finite.any():
        return
    ours, eager = (
        torch.where(finite, tensor.cpu().double() - exact, 0.0).abs().max().item() for tensor in (ours, eager)
    )
    allowed = factor * eager + floor * (1 + exact[finite].abs().max().item())
    assert ours <= allowed, f"{what}: {ours} against {eager} of eager"
