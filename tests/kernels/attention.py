"""Random cases of memory-token attention, and what results are held against: float64, and eager in the same dtype."""

import dataclasses

import torch
from hypothesis import strategies as st

from r3mem_fast.kernels.attention import reference
from r3mem_fast.kernels.attention.arguments import AttentionInputs, AttentionSettings

NAMES = ("query", "key", "value", "memory_key", "memory_value")


@dataclasses.dataclass(frozen=True)
class Case:
    """rows, heads, group: query heads a key head. memory: its tokens, None for none. varlen: sequences one after the
    other. Flags: whether there are such tensors."""

    rows: int = 2
    shared: int = 1
    group: int = 1
    tokens: int = 5
    offset: int = 0
    memory: int | None = 3
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    one_memory: bool = False
    memory_lengths: bool = False
    segment_starts: bool = False
    varlen: bool = False
    seed: int = 0

    def tensors(self, device="cpu"):
        """By name, with None for what is absent; and, of varlen, cu_seqlens and max_seqlen."""
        generator = torch.Generator().manual_seed(self.seed)

        def values(*shape):
            return torch.randn(shape, generator=generator).to(self.dtype).to(device)

        def integers(low, high):
            return torch.randint(low, high + 1, (self.rows,), generator=generator, dtype=torch.int32).to(device)

        found = dict.fromkeys((*NAMES, "memory_lengths", "segment_starts", "cu_seqlens", "sinks"))
        heads, keys = self.shared * self.group, self.tokens + self.offset
        if self.varlen:
            lengths = integers(0, self.tokens)
            lengths[0] = self.tokens
            ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
            found["cu_seqlens"] = ends
            total = int(ends[-1])
            found["query"] = values(total, heads, self.head_dim)
            found["key"], found["value"] = (values(total, self.shared, self.head_dim) for _ in range(2))
        else:
            # Heads of a token side by side, as a model's projections leave them.
            found["query"] = values(self.rows, self.tokens, heads, self.head_dim).transpose(1, 2)
            shape = (self.rows, keys, self.shared, self.head_dim)
            found["key"], found["value"] = (values(*shape).transpose(1, 2) for _ in range(2))
        if self.memory is not None:
            shape = (1 if self.one_memory else self.rows, self.shared, self.memory, self.head_dim)
            found["memory_key"], found["memory_value"] = values(*shape), values(*shape)
            if self.memory_lengths:
                found["memory_lengths"] = integers(0, self.memory)
        if self.segment_starts and not self.varlen:
            found["segment_starts"] = integers(0, keys)
        if self.sinks:
            found["sinks"] = values(heads).float()
        return found

    @property
    def settings(self):
        """As the implementations take them."""
        lengths = {"max_seqlen": self.tokens} if self.varlen else {"query_offset": self.offset}
        return AttentionSettings(self.head_dim**-0.5, self.window, self.softcap, **lengths)


def cases(dtypes, most_tokens=40, **fixed):
    """A strategy: shapes that are and are no powers of two, empty memories, grouped heads, ragged lengths."""
    strategies = {
        "rows": st.integers(1, 3),
        "shared": st.integers(1, 2),
        "group": st.sampled_from([1, 2, 3, 4, 8]),
        "tokens": st.integers(1, most_tokens),
        "offset": st.sampled_from([0, 0, 1, 7, 20]),
        "memory": st.sampled_from([None, 0, 1, 3, 16, 17, 33]),
        "head_dim": st.sampled_from([8, 16, 64, 80, 96]),
        "dtype": st.sampled_from(dtypes),
        "window": st.sampled_from([None, None, 1, 5, 16, 100]),
        "softcap": st.sampled_from([None, None, 2.0, 30.0]),
        "sinks": st.booleans(),
        "one_memory": st.booleans(),
        "memory_lengths": st.booleans(),
        "segment_starts": st.booleans(),
        "varlen": st.booleans(),
        "seed": st.integers(0, 99),
    }
    strategies |= {name: st.just(value) for name, value in fixed.items()}
    return st.builds(Case, **strategies)


def wide(tensors):
    return {n: t.double() if t is not None and t.is_floating_point() else t for n, t in tensors.items()}


def rows_of(tensors, case):
    """varlen tensors as padded rows, as the reference takes them."""
    if tensors["cu_seqlens"] is None:
        return tensors
    own = {n: reference.pad_sequences(tensors[n], tensors["cu_seqlens"], case.tokens) for n in NAMES[:3]}
    return {**tensors, **own, "cu_seqlens": None}


def expected(tensors, case, eager=False):
    """`(o, lse)` by the reference; eager: as models compute it, each product in the tensors' dtype."""
    given = rows_of(tensors, case)
    attention = eager_attention if eager else reference.memory_attention
    output, lse = attention(AttentionInputs(**given), case.settings)
    if case.varlen:
        total = len(tensors["query"])
        output, lse = (reference.pack_sequences(t, tensors["cu_seqlens"], total) for t in (output, lse))
        lse = lse.transpose(0, 1)
    return output, lse


def eager_attention(inputs, settings):
    """Concatenated keys, a mask tensor, and a softmax in float32 whose result is rounded: `eager` of transformers."""
    query, softcap = inputs.query, settings.softcap
    keys, values = (
        torch.cat(
            [
                part.repeat_interleave(query.shape[1] // part.shape[1], 1).expand(len(query), -1, -1, -1)
                for part in parts
                if part is not None
            ],
            2,
        )
        for parts in ((inputs.memory_key, inputs.key), (inputs.memory_value, inputs.value))
    )
    logits = settings.scale * (query @ keys.transpose(-1, -2))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    visible = reference.visible_keys(inputs, settings)
    logits = logits.float().masked_fill(~visible, -torch.inf)
    if inputs.sinks is not None:
        column = inputs.sinks[None, :, None, None].expand(*logits.shape[:-1], 1).to(logits.dtype)
        logits = torch.cat([logits, column], -1)
    weights = logits.softmax(-1).nan_to_num(0.0)[..., : keys.shape[2]]
    return weights.to(query.dtype) @ values, logits.logsumexp(-1)


def assert_within_budget(ours, exact, eager, what, factor=2, dtype=None):
    """|ours - exact| <= factor * |eager - exact|, largest errors.

    Eager's error counts as what one rounding to its dtype costs, at least (or to dtype, of what is computed from
    numbers of that): of few numbers it may be next to nothing by chance. Beside that what rounding costs where weights
    are made anew, from logits and lse in float32: 2^-24 |z| of each.
    """
    assert ours.shape == exact.shape, what
    finite = exact.isfinite()
    assert torch.equal(ours.isfinite(), finite), what
    if not finite.any():
        return
    zero = torch.zeros((), dtype=torch.float64)
    difference, allowed = ((torch.where(finite, t.double() - exact, zero)).abs().max().item() for t in (ours, eager))
    largest = exact[finite].abs().max().item()
    allowed = max(allowed, torch.finfo(dtype or eager.dtype).eps / 2 * largest)
    floor = 3e-6 * largest + 3e-6
    assert difference <= factor * allowed + floor, f"{what}: {difference} against {allowed} of eager"
