"""The matching kernels' variants, as the compile gate and the count of traffic go through them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from r3mem_fast.kernels.common.launch import Launch
from r3mem_fast.kernels.matching.arguments import MatchingInputs, MatchingSettings

KERNELS = ("forward", "scores", "system", "cross")
HEAD_DIMS = (64, 80, 96, 128, 256)


@dataclass(frozen=True)
class Shape:
    """Sizes of a call. The default: what is compiled, which none of them changes.

    Attributes:
        rows: Rows.
        heads: Query heads.
        key_heads: Key heads.
        queries: Queries.
        keys: Keys.
        kept: Kept keys: some blocks of them.
        few: Kept keys where one block holds all.
    """

    rows: int = 2
    heads: int = 8
    key_heads: int = 2
    queries: int = 1024
    keys: int = 4096
    kept: int = 256
    few: int = 16


@dataclass(frozen=True)
class MatchingCase:
    """One kernel in one variant.

    Attributes:
        kernel: One of `KERNELS`.
        variant: `plain`, or `all` (with a window, a softcap and sinks); for `forward` also `missing` (with a target,
            for kept keys); for `system` also `few` and `few_all` (one block holds all kept keys).
        head_dim: Size of a head.
        dtype: Dtype of queries, keys and values.
    """

    kernel: str
    variant: str
    head_dim: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Name of the kernel and variant."""
        return f"matching_{self.kernel}/{self.variant}"

    @property
    def fields(self) -> dict[str, Any]:
        """What a record says of the case."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"kernel": self.name, "dtype": dtype, "head_dim": self.head_dim}

    def keys(self, shape: Shape) -> int:
        """Return how many keys there are."""
        if self.variant in ("few", "few_all"):
            return shape.few
        return shape.kept if self.kernel in ("system", "cross") or self.variant == "missing" else shape.keys

    def launch(self, target: str, device: str = "meta", shape: Shape | None = None) -> Launch:
        """Plan its launch as on `target`, with random tensors where the device holds values."""
        from r3mem_fast.kernels.matching import triton as kernels

        shape = shape or Shape()
        keys = self.keys(shape)
        generator = torch.Generator().manual_seed(0)

        def values(*size: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            if device == "meta":
                return torch.empty(size, dtype=dtype, device=device)
            return torch.randn(size, generator=generator).to(dtype)

        everything = self.variant in ("all", "few_all")
        query = values(shape.rows, shape.heads, shape.queries, self.head_dim)
        key, value = (values(shape.rows, shape.key_heads, keys, self.head_dim) for _ in range(2))
        positions = torch.arange(keys + shape.queries, dtype=torch.int32, device=device)
        inputs = MatchingInputs(
            query,
            key,
            value,
            positions[keys:].repeat(shape.rows, 1),
            positions[:keys].repeat(shape.rows, shape.key_heads, 1),
            values(shape.heads, dtype=torch.float32) if everything else None,
        )
        settings = MatchingSettings(
            self.head_dim**-0.5, 30.0 if everything else None, keys + shape.queries // 2 if everything else None
        )
        if self.kernel in ("forward", "scores") and self.variant != "missing":
            launches, _ = kernels.plan_attention_scores(inputs, settings, target=target)
        else:
            wanted = values(*query.shape, dtype=torch.float32)
            launches, *_ = kernels.plan_value_system(inputs, wanted, settings, target=target)
        return next(found for found in launches if found.kernel.__name__ == f"matching_{self.kernel}_kernel")

    def least_bytes(self, launch: Launch, shape: Shape) -> int:
        """Return the least that this launch can move with its blocks.

        What a program keeps is read and written once, and all of the other side once for each block (and part of the
        sum, of which every one is written).
        """
        keys, line = self.keys(shape), self.head_dim * self.dtype.itemsize
        wide = 4 * self.head_dim
        pairs, lines = shape.rows * shape.key_heads, shape.heads // shape.key_heads * shape.queries
        block_m, block_n = (launch.constexprs[name] for name in ("BLOCK_M", "BLOCK_N"))
        of_line, of_key = line + 4, line + 4  # each with its position
        if self.kernel == "forward":
            own = lines * (of_line + wide + 4 + (wide if self.variant == "missing" else 0))
            return pairs * (own + math.ceil(lines / block_m) * keys * (of_key + line))
        blocks, splits = math.ceil(keys / block_n), launch.arguments["splits"]
        if self.kernel == "scores":
            return pairs * (splits * keys * (of_key + 4) + blocks * lines * (of_line + 4))
        if self.kernel == "system":
            whole = self.variant == "few"  # reads values and makes lse itself
            written = 4 * sum(min(block_n, keys - first) ** 2 for first in range(0, keys, block_n)) + keys * wide
            read = keys * (of_key + (line if whole else 0))
            return pairs * (splits * (read + written) + blocks * lines * (of_line + wide + 4))
        crossed = range(0, keys, block_n)
        sizes = [(min(block_n, keys - i), min(block_n, keys - j)) for i in crossed for j in crossed if j < i]
        of_blocks = sum((left + right) * of_key + 2 * 4 * left * right for left, right in sizes)
        return pairs * (splits * of_blocks + len(sizes) * lines * (of_line + 4))


def matching_cases(dtypes: Sequence[torch.dtype], head_dims: Sequence[int] = HEAD_DIMS) -> list[MatchingCase]:
    """Make all kernels for each dtype and head_dim, and at head_dim 128 with everything.

    Args:
        dtypes: Dtypes of queries, keys and values.
        head_dims: Sizes of a head.

    Returns:
        The cases.
    """
    found = []
    for dtype in dtypes:
        for kernel in KERNELS:
            variants = ("plain", "few") if kernel == "system" else ("plain",)
            found += [MatchingCase(kernel, variant, head_dim, dtype) for head_dim in head_dims for variant in variants]
            if 128 in head_dims:
                more = {"forward": ("all", "missing"), "system": ("all", "few_all")}.get(kernel, ("all",))
                found += [MatchingCase(kernel, variant, 128, dtype) for variant in more]
    return found
