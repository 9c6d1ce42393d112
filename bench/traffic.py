"""Bytes that each kernel moves over the least possible, counted without a GPU.

    python -m bench.traffic --json

One record a kernel, dtype and number of side bits:

    least_bytes   every input read once and every output written once (streams: both), checksums included
    moved_bytes   what the kernel's loads and stores ask for in Triton's interpreter, element by element, without the
                  masked ones. Requests: neither caches nor the granularity of memory are in it
    ratio         moved over least
    eager_ratio   the same for the reference in eager PyTorch as it runs on a GPU: every tensor that an ATen operator
                  reads or writes, once each, views aside

Of attention and matching, one record a kernel and head_dim, with the blocks of cuda:90: least is what FlashAttention
moves with these blocks, so that keys and values (backward, and matching: queries, too) are read once for each block
that sees them; `once_ratio` is moved over every input and output once.

Exit status 1 if a ratio is above 1.05. bfloat16 is counted too, which the interpreter computes wrongly: what a kernel
loads and stores does not depend on values.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r3mem_fast.kernels.coupling import TILE, reference

from .attention_cases import KERNELS, AttentionCase
from .coupling_cases import DTYPES, cases
from .matching_cases import KERNELS as MATCHING_KERNELS
from .matching_cases import MatchingCase, Shape
from .records import add_output_option, write_records

LIMIT = 1.05
# Some full tiles and a short one.
_NUMEL = 8 * TILE + 16 * 37
# Rows, query heads, key heads, tokens, memory tokens: several blocks, the last ones short.
_ATTENTION_SHAPE = (2, 4, 1, 600, 160)
_MATCHING_SHAPE = Shape(rows=2, heads=6, key_heads=2, queries=288, keys=352, kept=144, few=48)


class Traffic:
    """Bytes loaded and stored by the Triton kernels interpreted inside `counted()`."""

    def __init__(self):
        self.loaded = self.stored = 0

    @contextlib.contextmanager
    def counted(self):
        """Count the bytes that kernels ask for in the interpreter, while this lasts."""
        from triton.runtime.interpreter import InterpreterBuilder

        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def masked_load(builder, ptrs, mask, *rest):
            self.loaded += _bytes_asked_for(ptrs, mask)
            return load(builder, ptrs, mask, *rest)

        def masked_store(builder, ptrs, value, mask, *rest):
            self.stored += _bytes_asked_for(ptrs, mask)
            return store(builder, ptrs, value, mask, *rest)

        # Unmasked accesses go through the masked ones.
        with (
            mock.patch.object(InterpreterBuilder, "create_masked_load", masked_load),
            mock.patch.object(InterpreterBuilder, "create_masked_store", masked_store),
        ):
            yield


def _bytes_asked_for(ptrs, mask):
    return int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8


class EagerTraffic(TorchDispatchMode):
    """Bytes of the tensors that ATen operators read and write inside the block."""

    def __init__(self):
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.is_view:
            return result
        arguments = function._schema.arguments
        for argument, value in [
            *zip(arguments, args, strict=False),
            *((a, (kwargs or {}).get(a.name)) for a in arguments),
        ]:
            tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
            # An operator that fills, or copies into, its first argument does not read it.
            only_written = function.overloadpacket.__name__ in ("zero_", "fill_", "copy_") and argument.name == "self"
            if not only_written and not argument.is_out:
                self.moved += sum(_nbytes(tensor) for tensor in tensors)
        if not function.overloadpacket.__name__.startswith("empty"):
            self.moved += sum(_nbytes(leaf) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


def _nbytes(tensor):
    return tensor.numel() * tensor.element_size()


def count(case, numel=_NUMEL) -> dict:
    """The record of one case."""
    from r3mem_fast.kernels.coupling import triton as kernels

    traffic, eager = Traffic(), EagerTraffic()
    tensors, settings = case.inputs(numel, "cpu")
    with traffic.counted():
        case.call(kernels, tensors, settings)
    # On no device that it could look at values on, the reference runs what it would on a GPU.
    tensors, settings = case.inputs(numel, "meta")
    with eager:
        case.call(reference, tensors, settings)
    least, moved = case.least_bytes(numel), traffic.loaded + traffic.stored
    return {
        **case.fields,
        "least_bytes_per_element": round(least / numel, 4),
        "least_bytes": least,
        "moved_bytes": moved,
        "ratio": round(moved / least, 4),
        "eager_ratio": round(eager.moved / least, 2),
    }


def count_attention(case, shape=_ATTENTION_SHAPE) -> dict:
    """The record of one attention kernel, in the variant `plain`."""
    traffic = Traffic()
    launch = case.launch("cuda:90", "cpu", shape)
    with traffic.counted():
        launch.run()
    least, moved = case.least_bytes(launch, shape), traffic.loaded + traffic.stored
    tensors = {id(t): t for t in launch.arguments.values() if isinstance(t, torch.Tensor)}
    return {
        **case.fields,
        "shape": dict(zip(("rows", "heads", "key_heads", "tokens", "memory"), shape, strict=True)),
        "least_bytes": least,
        "moved_bytes": moved,
        "ratio": round(moved / least, 4),
        "once_ratio": round(moved / sum(_nbytes(tensor) for tensor in tensors.values()), 4),
    }


def count_matching(case, shape=_MATCHING_SHAPE) -> dict:
    """The record of one matching kernel, in a variant without a window, softcap or sinks."""
    traffic = Traffic()
    launch = case.launch("cuda:90", "cpu", shape)
    with traffic.counted():
        launch.run()
    least, moved = case.least_bytes(launch, shape), traffic.loaded + traffic.stored
    tensors = {id(t): t for t in launch.arguments.values() if isinstance(t, torch.Tensor)}
    return {
        **case.fields,
        "shape": dataclasses.asdict(shape),
        "least_bytes": least,
        "moved_bytes": moved,
        "ratio": round(moved / least, 4),
        "once_ratio": round(moved / sum(_nbytes(tensor) for tensor in tensors.values()), 4),
    }


def table(records) -> str:
    """Return the records as lines of text."""
    lines = [f"{'kernel':28} {'dtype':9} {'head_dim':>8} {'least, bytes':>16} {'ratio':>7} {'once':>6}"]
    for record in records:
        if "head_dim" in record:
            lines.append(
                f"{record['kernel']:28} {record['dtype']:9} {record['head_dim']:>8} {record['least_bytes']:>16} "
                f"{record['ratio']:>7.4f} {record['once_ratio']:>6.2f}"
            )
    lines.append(f"{'kernel':28} {'dtype':9} {'bits':>8} {'least, B/element':>16} {'ratio':>7} {'eager':>6}")
    for record in records:
        if "bits" not in record:
            continue
        bits = "-" if record["bits"] is None else record["bits"]
        lines.append(
            f"{record['kernel']:28} {record['dtype']:9} {bits:>8} {record['least_bytes_per_element']:>16.3f} "
            f"{record['ratio']:>7.4f} {record['eager_ratio']:>6.2f}"
        )
    return "\n".join(lines)


def main(arguments=None):
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__.split("\n")[0])
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--json", action="store_true", help="print one JSON line a record")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported, below
    wanted = [case for case in cases(DTYPES.values()) if options.kernel in case.name]
    of_attention = [AttentionCase(kernel, "plain", dim, torch.bfloat16) for kernel in KERNELS for dim in (64, 128)]
    of_attention = [case for case in of_attention if options.kernel in case.name]
    of_matching = [
        MatchingCase(kernel, "plain", dim, torch.bfloat16) for kernel in MATCHING_KERNELS for dim in (64, 128)
    ]
    more = (("forward", "missing"), ("system", "few"))
    of_matching += [MatchingCase(*kernel, dim, torch.bfloat16) for kernel in more for dim in (64, 128)]
    of_matching = [case for case in of_matching if options.kernel in case.name]
    if not wanted and not of_attention and not of_matching:
        parser.error(f"no kernel's name contains {options.kernel!r}")
    records = [count(case) for case in wanted] + [count_attention(case) for case in of_attention]
    records += [count_matching(case) for case in of_matching]
    if options.json:
        print("\n".join(json.dumps(record) for record in records))
    else:
        print(table(records))
    if options.output:
        write_records(options.output, records)
    return 1 if any(record["ratio"] > LIMIT for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
