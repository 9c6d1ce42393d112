"""The attention kernels' variants, as the compile gate and the count of traffic go through them."""

import math
from dataclasses import dataclass

import torch

from r3mem_fast.kernels.attention import MAX_DECODED
from r3mem_fast.kernels.attention.arguments import AttentionInputs, AttentionSettings

KERNELS = ("forward", "query", "key", "memory", "delta", "decode", "combine")
# The forward pass again, for some GPUs, head_dims and dtypes; not counted among the others.
SPECIALISED = "specialised"
# Variants by where tensors lie, and how many rows or memory tokens there are.
_LAYOUTS = {
    "forward": ("packed", "alone", "short"),
    "query": ("packed", "alone", "short"),
    "key": ("packed",),
    "memory": ("packed",),
    "decode": ("once",),
}
HEAD_DIMS = (64, 80, 96, 128, 256)
# Rows, query heads, key heads, tokens, memory tokens: of what is compiled, which none of them changes.
_SHAPE = (2, 8, 2, 4096, 128)


@dataclass(frozen=True)
class AttentionCase:
    """One kernel.

    kernel: of `KERNELS`, or `SPECIALISED`; query, key, memory and delta are of the backward pass, combine of decoding.
    variant: `plain` (a memory, then the segment, causal), or `all` (also memory lengths, segment starts, a window, a
    softcap and sinks; no softcap of SPECIALISED, which takes none); of decoding also `many` (as many queries as it
    takes) and `once` (so many rows that the keys are not split); of others `packed` (sequences one after the other),
    `alone` (a memory without a segment, as the vendor's attention is merged with) and `short` (a memory of 16 tokens).
    """

    kernel: str
    variant: str
    head_dim: int
    dtype: torch.dtype

    @property
    def name(self):
        """Name of the case, for tables."""
        return f"attention_{self.kernel}/{self.variant}"

    @property
    def fields(self):
        """What a record says of the case."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"kernel": self.name, "dtype": dtype, "head_dim": self.head_dim}

    @property
    def targets(self):
        """Targets that there is such a kernel for; None: all."""
        return ("cuda:90", "cuda:100") if self.kernel == SPECIALISED else None

    @property
    def uses_tensor_cores(self):
        """Whether the kernel multiplies matrices."""
        return self.kernel not in ("delta", "combine")

    def launch(self, target, device="meta", shape=_SHAPE):
        """Its launch as on `target`, of random tensors where the device holds values."""
        from r3mem_fast.kernels.attention import triton as kernels

        rows, heads, shared, tokens, memory = shape
        if self.variant == "once":
            rows = 66
        if self.variant == "short":
            memory = 16
        generator = torch.Generator().manual_seed(0)

        def values(*size, dtype=self.dtype):
            if device == "meta":
                return torch.empty(size, dtype=dtype, device=device)
            return torch.randn(size, generator=generator).to(dtype)

        def integers(value):
            return torch.full((rows,), value, dtype=torch.int32, device=device)

        everything = self.variant == "all"
        decodes = self.kernel in ("decode", "combine")
        queries = MAX_DECODED * shared // heads if self.variant == "many" else 1 if decodes else tokens
        query = values(rows, heads, queries, self.head_dim)
        own = [values(rows, shared, tokens, self.head_dim) for _ in range(2)]
        if self.variant == "alone":
            own = [None, None]
        of_memory = [values(rows, shared, memory, self.head_dim) for _ in range(2)]
        lengths, starts = (integers(memory // 2), integers(tokens // 4)) if everything else (None, None)
        sinks = values(heads, dtype=torch.float32) if everything else None
        settings = AttentionSettings(
            scale=self.head_dim**-0.5,
            window=tokens // 2 if everything else None,
            softcap=30.0 if everything and self.kernel != SPECIALISED else None,
        )
        if decodes:
            inputs = AttentionInputs(query, *own, *of_memory, lengths, starts, sinks=sinks)
            launches, _ = kernels.plan_memory_decode(inputs, integers(tokens), settings, target=target)
            return launches[0 if self.kernel == "decode" else 1]
        ends = None
        if self.variant == "packed":
            ends = torch.arange(0, (rows + 1) * tokens, tokens, dtype=torch.int32, device=device)
            query, *own = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, *own))
            settings = settings._replace(max_seqlen=tokens)
        inputs = AttentionInputs(query, *own, *of_memory, lengths, starts, ends, sinks)
        if self.kernel == "forward":
            return kernels.plan_memory_attention(inputs, settings, target=target)[0]
        if self.kernel == SPECIALISED:
            return kernels.forward_specialised.plan_memory_attention(inputs, settings, target=target)[0]
        lse = values(*((heads, rows * tokens) if ends is not None else (rows, heads, tokens)), dtype=torch.float32)
        grad_lse = lse if everything else None
        launches, _ = kernels.plan_memory_attention_backward(
            query, grad_lse, inputs, query, lse, settings, target=target
        )
        return next(found for found in launches if found.kernel.__name__ == f"attention_{self.kernel}_kernel")

    def least_bytes(self, launch, shape):
        """The least that this launch can move, of variant `plain`.

        What a program keeps is read and written once, and of the other side what is seen from its block: that is
        FlashAttention with these blocks. Decoding reads keys and values once.
        """
        rows, heads, shared, tokens, memory = shape
        line = self.head_dim * self.dtype.itemsize
        block_m, block_n = (launch.constexprs.get(name) for name in ("BLOCK_M", "BLOCK_N"))
        if self.kernel == "delta":
            return rows * heads * tokens * (2 * line + 4)
        if self.kernel == "decode":
            splits = launch.arguments["splits"]
            parts = rows * heads * splits * (4 * self.head_dim + 4)
            return (
                rows * shared * (memory + tokens) * 2 * line
                + splits * rows * heads * line
                + parts
                + rows * shared * (splits * 4)
            )
        if self.kernel == "combine":
            splits = launch.arguments["splits"]
            return rows * heads * (splits * (4 * self.head_dim + 8) + line + 4)
        if self.kernel in ("forward", "query"):
            seen = sum(memory + min(end, tokens) for end in range(block_m, tokens + block_m, block_m))
            own = tokens * (2 * line + 4 if self.kernel == "forward" else 3 * line + 8)
            return rows * heads * (own + seen * 2 * line)
        per_query = 2 * line + 8
        group = heads // shared
        if self.kernel == "key":
            seen = sum(tokens - start for start in range(0, tokens, block_n))
            return rows * shared * (tokens * 4 * line + group * seen * per_query)
        splits = launch.arguments["splits"]
        blocks = math.ceil(memory / block_n)
        own = splits * memory * (2 * line + 2 * 4 * self.head_dim)
        return rows * shared * (own + group * blocks * tokens * per_query)


def attention_cases(dtypes, head_dims=HEAD_DIMS):
    """All kernels for each dtype and head_dim, and with everything, packed, and without a segment at head_dim 128."""
    found = []
    for dtype in dtypes:
        for kernel in KERNELS:
            found += [AttentionCase(kernel, "plain", head_dim, dtype) for head_dim in head_dims]
            if kernel == "decode":
                found += [AttentionCase(kernel, "many", head_dim, dtype) for head_dim in head_dims]
            if 128 in head_dims:
                variants = ("all", *_LAYOUTS.get(kernel, ()))
                found += [AttentionCase(kernel, variant, 128, dtype) for variant in variants]
        if dtype.itemsize == 2:
            variants = ("plain", "all")
            found += [
                AttentionCase(SPECIALISED, v, dim, dtype) for v in variants for dim in (64, 128) if dim in head_dims
            ]
    return found
