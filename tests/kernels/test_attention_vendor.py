"""cuDNN's attention merged with a memory: who calls it, with what, and what comes of it.

Without a GPU a stand-in takes its place, which is held to the operators' schemas and computes what they compute in
float64. Backward it knows nothing but the output and log-sum-exps that it is given, which are the merged ones.
"""

import types

import pytest
import torch
from hypothesis import example, given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from r3mem_fast.kernels.attention import vendor
from r3mem_fast.kernels.attention.arguments import AttentionInputs, AttentionSettings

from .attention import NAMES, Case, assert_within_budget, cases, expected, wide
from .test_attention_triton import gradients

GPU = torch.cuda.is_available()


def bind(operator, args, kwargs):
    """By name: arguments as the operator would take them."""
    found, positional = {}, iter(args)
    for argument in operator._schema.arguments:
        if argument.kwarg_only:
            found[argument.name] = kwargs.pop(argument.name, argument.default_value)
        else:
            given = next(positional, argument.default_value)
            assert given is not None or "Tensor" in str(argument.type), argument.name
            found[argument.name] = given
            if given is not None and str(argument.type) != "Optional[Tensor]":
                expected_type = {"Tensor": torch.Tensor, "bool": bool, "float": float}.get(str(argument.type), int)
                assert type(given) is expected_type, argument.name
    assert not kwargs and next(positional, None) is None
    return types.SimpleNamespace(**found)


def logits_of(call):
    """Scaled and causally masked, `[B, Hq, T, T]`."""
    group = call.query.shape[1] // call.key.shape[1]
    logits = call.scale * call.query @ call.key.repeat_interleave(group, 1).transpose(-1, -2)
    return logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -torch.inf), group


class StandIn:
    """torch.ops.aten, with cuDNN's two operators computed in plain PyTorch."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return getattr(torch.ops.aten, name)

    def _scaled_dot_product_cudnn_attention(self, *args, **kwargs):
        call = bind(torch.ops.aten._scaled_dot_product_cudnn_attention.default, args, kwargs)
        assert call.attn_bias is None and call.compute_log_sumexp and call.is_causal and call.dropout_p == 0.0
        self.calls.append("forward")
        logits, group = logits_of(call)
        output = logits.softmax(-1) @ call.value.repeat_interleave(group, 1)
        tokens, none = call.query.shape[2], None
        return output, logits.logsumexp(-1, keepdim=True), none, none, tokens, tokens, none, none, none

    def _scaled_dot_product_cudnn_attention_backward(self, *args, **kwargs):
        call = bind(torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default, args, kwargs)
        assert call.is_causal and call.dropout_p == 0.0 and call.max_q == call.max_k == call.query.shape[2]
        assert call.attn_bias is call.cum_seq_q is call.cum_seq_k is None
        assert call.logsumexp.shape == (*call.query.shape[:-1], 1) and call.logsumexp[..., 0].is_contiguous()
        for tensor in (call.grad_out, call.out):  # what its graph was built for, whatever these are
            assert tensor.stride() == torch.empty_like(call.query).stride()
        self.calls.append("backward")
        logits, group = logits_of(call)
        weights = (logits - call.logsumexp).exp()
        delta = (call.grad_out * call.out).sum(-1, keepdim=True)
        grad_logits = weights * (call.grad_out @ call.value.repeat_interleave(group, 1).transpose(-1, -2) - delta)

        def by_key_head(tensor):
            return tensor.unflatten(1, (-1, group)).sum(2)

        grad_query = call.scale * grad_logits @ call.key.repeat_interleave(group, 1)
        grad_key = by_key_head(call.scale * grad_logits.transpose(-1, -2) @ call.query)
        return grad_query, grad_key, by_key_head(weights.transpose(-1, -2) @ call.grad_out)


@settings(max_examples=40)
@given(cases([torch.float64], varlen=False, offset=0, window=None, softcap=None, segment_starts=False))
@example(Case(shared=2, group=3, tokens=7, memory=None, dtype=torch.float64))
@example(Case(shared=2, group=3, tokens=7, memory=4, dtype=torch.float64, memory_lengths=True, sinks=True))
def test_the_algebra_of_both_passes(case):
    """The output, and the gradients of merged output and lse, are those of one softmax over memory and segment."""
    tensors = case.tensors()
    inputs = AttentionInputs(**tensors)
    if vendor.why_not(inputs, case.settings) is not None:
        return
    stand_in = StandIn()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vendor, "_aten", stand_in)
        patch.setattr(vendor, "choose_kernel", lambda *tensors: "cudnn")
        output, lse = vendor.memory_attention(inputs, case.settings)
        for ours, exact in zip((output, lse), expected(tensors, case), strict=True):
            torch.testing.assert_close(ours, exact)
        # In another layout than the query's, too.
        grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found = vendor.memory_attention_backward(grad_output, inputs, output, lse, case.settings)
    assert stand_in.calls == ["forward", "backward"]
    for name, ours, exact in zip((*NAMES, "sinks"), found, gradients(tensors, case, grad_output, None), strict=True):
        assert (ours is None) == (exact is None), name
        if ours is not None:
            torch.testing.assert_close(ours, exact, msg=lambda message, name=name: f"{name}: {message}")


def test_which_kernel(monkeypatch):
    """cuDNN's from Hopper on, if PyTorch can call it for the head_dim; flash attention elsewhere."""
    capability, asked = [(9, 0)], []

    def can_use(params):
        asked.append(params)
        return can_use.answer

    can_use.answer = True
    monkeypatch.setattr(vendor, "capability_of", lambda device: capability[0])
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *arguments: arguments)
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", can_use)

    def chosen(head_dim=128, device="cuda"):
        with FakeTensorMode():
            query, key = (torch.empty(2, heads, 32, head_dim, dtype=torch.bfloat16, device=device) for heads in (8, 2))
            return vendor.choose_kernel(query, key, key)

    for capability[0], wanted in (((8, 0), "flash"), ((8, 9), "flash"), ((9, 0), "cudnn"), ((10, 0), "cudnn")):
        assert chosen() == wanted
    assert asked[0][3:] == (None, 0.0, True, True)
    assert chosen(256) == "flash"  # cuDNN of some versions has no backward pass for it
    can_use.answer = False
    assert chosen() == "flash"
    assert chosen(device="cpu") == "cpu"


def test_other_devices_have_no_capability():
    from r3mem_fast.kernels.common.compat import capability_of

    assert capability_of(torch.device("cpu")) == (0, 0)


@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
def test_the_operators_are_called_as_they_want(kernel, monkeypatch):
    """With tensors that have no values, for there need not be a GPU: of the right shapes, types and arguments."""
    monkeypatch.setattr(vendor, "choose_kernel", lambda *tensors: kernel)
    with FakeTensorMode():
        query = torch.empty(2, 32, 8, 64, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        key = torch.empty(2, 2, 32, 64, dtype=torch.bfloat16, device="cuda")
        inputs, scale = AttentionInputs(query, key, key), AttentionSettings(0.125)
        output, lse = vendor.memory_attention(inputs, scale)
        assert output.shape == query.shape and lse.shape == (2, 8, 32) and lse.dtype == torch.float32
        found = vendor.memory_attention_backward(output, inputs, output, lse, scale)
        assert [grad.shape for grad in found[:3]] == [query.shape, key.shape, key.shape]


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("memory", [None, 100])
def test_on_a_gpu(kernel, dtype, head_dim, memory, monkeypatch):
    """Both passes against float64, with a memory and without; with either kernel where the GPU has it."""
    case = Case(shared=2, group=4, tokens=700, memory=memory, head_dim=head_dim, dtype=dtype, memory_lengths=True)
    tensors = case.tensors("cuda")
    inputs = AttentionInputs(**tensors)
    if kernel == "cudnn" and vendor.choose_kernel(inputs.query, inputs.key, inputs.value) != kernel:
        pytest.skip("cuDNN's is not chosen on this GPU")
    monkeypatch.setattr(vendor, "choose_kernel", lambda *tensors: kernel)
    output, lse = vendor.memory_attention(inputs, case.settings)
    exact, eager = expected(wide(tensors), case), expected(tensors, case, eager=True)
    assert_within_budget(output, exact[0], eager[0], "output")
    assert_within_budget(lse, exact[1], eager[1], "lse")
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype).cuda()
    found = vendor.memory_attention_backward(grad_output, inputs, output, lse, case.settings)
    one = gradients(wide(tensors), case, grad_output.double(), None)
    other = gradients(tensors, case, grad_output, None, eager=True)
    for name, ours, *results in zip(NAMES, found[:5], one, other, strict=False):
        assert (ours is None) == (results[0] is None), name
        if ours is not None:
            assert_within_budget(ours, *results, name, factor=3)
