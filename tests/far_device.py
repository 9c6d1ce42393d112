"""A device that computes on the CPU and counts how often its host waits for it: stands in for a GPU.

Run as a script, because PyTorch cannot forget a device: prints, as JSON, what compressing histories of two lengths
made the host wait for.
"""

import collections
import json
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import LlamaConfig, LlamaForCausalLM

from r3mem_fast import R3MemConfig, R3MemModel
from r3mem_fast.integrations import graphs

NAME = "far"
# Operators whose results have a shape, or are a number, that a device would have to be asked for.
ASKING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique", "_assert")
INDEXING = ("index.", "index_put", "_index_put")


class Module(backend_registration._DummyBackendModule):
    """What PyTorch asks of a device's module."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


class FarTensor(torch.Tensor):
    """A tensor that says that it is on the device, with its values in one on the CPU."""

    def __new__(cls, inner):
        return cls._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} outside of the mode that counts")


class Waits(TorchDispatchMode):
    """Runs operators on the device, and counts in `counts` how often the host waits for it, by what for."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        far = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FarTensor)]
        target = kwargs.get("device")
        goes_far = bool(far) if target is None else torch.device(target).type == NAME
        self._count(function, args, kwargs, bool(far), goes_far)
        result = function(*tree_map(_nearby, args), **tree_map(_nearby, kwargs))
        if not goes_far:
            return result
        known = {id(tensor.inner): tensor for tensor in far}  # what is changed in place stays what it is
        return tree_map(lambda x: known.get(id(x)) or FarTensor(x) if isinstance(x, torch.Tensor) else x, result)

    def _count(self, function, args, kwargs, was_far, goes_far):
        name = function.name().removeprefix("aten::")
        if was_far and name.startswith(ASKING):
            self.counts[name] += 1
        if name.startswith(INDEXING) and any(isinstance(x, FarTensor) and x.dtype is torch.bool for x in args[1]):
            self.counts["indexing by a mask"] += 1
        if name == "_to_copy" and was_far and not goes_far:
            self.counts["download"] += 1
        if name == "_to_copy" and goes_far and not was_far:
            self.counts["upload" if kwargs.get("non_blocking") else "upload that waits"] += 1
        if name == "copy_" and isinstance(args[0], FarTensor) != isinstance(args[1], FarTensor):
            self.counts["copy between devices"] += 1


def _nearby(value):
    if isinstance(value, FarTensor):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) else value


def put_far(model):
    """Put a model's parameters and buffers on the device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(FarTensor(parameter.detach()), requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else FarTensor(buffer)


def small_model(beyond, attention):
    """A llama with a matched memory of 16 slots of segments of 24 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attn_implementation=attention,
    )
    settings = {"num_memory_tokens": 8, "memory_budget": 16, "segment_length": 24, "segment_overlap": 4}
    settings |= {"memory_writer": "matched", "adapter_rows": "memory", "beyond_budget": beyond}
    return R3MemModel(LlamaForCausalLM(config), R3MemConfig(**settings)).eval()


def main():
    """Compress histories of 3 and 9 segments, and print what the host waited for: by beyond_budget and segments.

    "graphs" captures segments by running them, for which nothing may be uploaded; "diagonal" reads them by diagonals.
    """
    beyond, attention, *others = sys.argv[1:]
    model = small_model(beyond, attention)
    ids = torch.randint(3, 96, (2, 9 * 24))
    mask = torch.ones_like(ids)
    if "ragged" in others:
        mask[0, :5] = 0
    expected = model.compress(ids, mask, finish=True).states
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    found = {}
    # That of the other kernels depends on the device.
    with sdpa_kernel(SDPBackend.MATH), Waits() as waits:
        put_far(model)
        model.compress(ids[:, :30])  # makes the fingerprints, which read every weight
        if "diagonal" in others:
            graphs.are_diagonal = lambda: True
        if "graphs" in others:

            def captured(step, inputs):
                before = dict(waits.counts)
                step(*inputs)
                waits.counts["captured"] += 1
                assert before == {name: n for name, n in waits.counts.items() if name != "captured"}
                return step

            graphs.are_wanted, graphs.captured = lambda device: True, captured
        for segments in (3, 9):
            waits.counts.clear()
            memory = model.compress(ids[:, : segments * 24], mask[:, : segments * 24], finish=True)
            found[segments] = dict(waits.counts)
    torch.testing.assert_close(memory.states.inner, expected)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
