"""The attention kernels in 16 bits over many blocks of keys, where main loops run: on a GPU; one case interpreted."""

import itertools

import pytest
import torch

from r3mem_fast.kernels.attention import reference
from r3mem_fast.kernels.attention import triton as kernels
from r3mem_fast.kernels.attention.arguments import AttentionInputs

from .attention import NAMES, Case, assert_within_budget, eager_attention, expected, wide
from .test_attention_triton import DEVICE, GPU, gradients

LONG = list(itertools.product((300, 1000, 4096), (16, 128, 300), (64, 128), (torch.bfloat16, torch.float16)))
# The interpreter computes bfloat16 wrongly, and takes minutes for more than this.
CASES = LONG if GPU else [(300, 16, 64, torch.float16), (300, 128, 128, torch.float16)]


def case_of(tokens, memory, head_dim, dtype):
    rows, shared, group = (2, 2, 4) if GPU else (1, 1, 2)
    return Case(
        rows=rows, shared=shared, group=group, tokens=tokens, memory=memory, head_dim=head_dim, dtype=dtype,
        segment_starts=rows > 1,
    )  # fmt: skip


@pytest.mark.parametrize(("tokens", "memory", "head_dim", "dtype"), CASES)
def test_forward_and_backward(tokens, memory, head_dim, dtype):
    case = case_of(tokens, memory, head_dim, dtype)
    tensors = case.tensors(DEVICE)
    output, lse = kernels.memory_attention(AttentionInputs(**tensors), case.settings)
    exact, eager = expected(wide(tensors), case), expected(tensors, case, eager=True)
    assert_within_budget(output, exact[0], eager[0], "output")
    assert_within_budget(lse, exact[1], eager[1], "lse")
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    found = kernels.memory_attention_backward(
        grad_output, None, AttentionInputs(**tensors), output, lse, case.settings
    )
    one = gradients(wide(tensors), case, grad_output.double(), None)
    other = gradients(tensors, case, grad_output, None, eager=True)
    for name, *results in zip(NAMES, found[:5], one, other, strict=False):
        assert_within_budget(*results, name, factor=3)


@pytest.mark.parametrize(("tokens", "memory", "head_dim", "dtype"), CASES)
def test_decode(tokens, memory, head_dim, dtype):
    """One query a row, behind caches that are filled to different lengths."""
    case = case_of(1, memory, head_dim, dtype)
    tensors = {**case.tensors(DEVICE), "segment_starts": None}
    draw = torch.Generator().manual_seed(2)
    shape = (2, case.rows, case.shared, tokens, head_dim)
    tensors["key"], tensors["value"] = torch.randn(shape, generator=draw).to(dtype).to(DEVICE)
    lengths = torch.randint(tokens // 2, tokens + 1, (case.rows,), generator=draw, dtype=torch.int32).to(DEVICE)
    output, lse = kernels.memory_decode(AttentionInputs(**tensors), lengths, case.settings)
    settings = case.settings._replace(query_offset=lengths - 1)
    exact = reference.memory_attention(AttentionInputs(**wide(tensors)), settings)
    eager = eager_attention(AttentionInputs(**tensors), settings)
    assert_within_budget(output, exact[0], eager[0], "output")
    assert_within_budget(lse, exact[1], eager[1], "lse")
