"""Memories of an adapter of anchors, to be read by the base model beside matched ones.

    python -m bench.anchored FOLDER OUTPUT --memory-allocation adaptive

saves an adapter of anchors with the same weights for memories of another allocation or budget, or with shorter
changes, so that it can be trained on, or rounded to another dtype.
"""

import argparse
import dataclasses
from collections.abc import Sequence

import torch

from r3mem_fast import Memory, R3MemModel, R3MemPipeline
from r3mem_fast.choices import ALLOCATIONS, BEYOND_BUDGET
from r3mem_fast.devices import as_dtype
from r3mem_fast.memory import MemoryLayout
from r3mem_fast.store.beside import with_layout

from .rivals import laid_out


def main(arguments: Sequence[str] | None = None) -> int:
    """Save the adapter that the command line asks for, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.anchored", description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="folder of the adapter")
    parser.add_argument("output", help="folder of the other one")
    parser.add_argument("--memory-allocation", choices=ALLOCATIONS, help="of its memories (as it is)")
    parser.add_argument("--memory-budget", type=int, help="slots of its memories at most (as it is)")
    parser.add_argument("--beyond-budget", choices=BEYOND_BUDGET, help="what becomes of them (as it is)")
    parser.add_argument("--longest-change", type=float, help="of their slots, see R3MemConfig (as it is)")
    parser.add_argument("--adapter-dtype", type=as_dtype, help="that its weights are rounded to (as it is)")
    options = parser.parse_args(arguments)
    pipeline = R3MemPipeline(options.folder)
    _refuse_other(pipeline.model, options.folder)
    names = ("memory_allocation", "memory_budget", "beyond_budget", "longest_change")
    given = {name: getattr(options, name) for name in names}
    changed = {name: value for name, value in given.items() if value is not None}
    pipeline.model.r3mem_config = dataclasses.replace(pipeline.model.r3mem_config, **changed)
    pipeline.save(options.output, adapter_dtype=options.adapter_dtype)
    return 0


def _refuse_other(learned: R3MemModel, folder: str) -> None:
    """Raise ValueError for an adapter that is none of anchors, or of anchors that the base model does not read."""
    if not learned.is_anchored:
        raise ValueError(f"{folder} holds no adapter of anchors (memory_writer='anchored')")
    if not learned.reads_as_base:
        raise ValueError(
            f"{folder} holds an adapter that reads, too (adapter_rows='all'): measure it by bench.adapted"
        )


def load_adapter(folder: str, model: R3MemModel, *, anchored: bool = False) -> R3MemModel:
    """Load an adapter with memory tokens.

    Args:
        folder: Its folder.
        model: The model that it is compared with.
        anchored: Whether it must be one of anchors.

    Raises:
        ValueError: It was made of another model, is none of anchors, or reads with its adapters.
    """
    learned = R3MemPipeline(folder, dtype=str(model.dtype).removeprefix("torch.")).model
    if anchored or learned.is_anchored:
        _refuse_other(learned, folder)
    if learned.base_fingerprint() != model.base_fingerprint():
        raise ValueError(f"{folder} was made of another model than the one that it is compared with")
    return learned


def anchored_memory(learned: R3MemModel, ids: torch.Tensor, start: Memory, layout: MemoryLayout) -> Memory:
    """Compress tokens with an adapter of anchors, into a memory that the base model can read.

    Args:
        learned: The model with the adapter.
        ids: Token ids, int64 `[B, T]`.
        start: Memory of what is before them, of B rows.
        layout: Layout of the memory.
    """
    before = with_layout(start, layout)
    with laid_out(learned, layout):
        mine = dataclasses.replace(before, origin=learned.origin())
        memory = learned.compress(ids, memory=mine, finish=True)
    return dataclasses.replace(memory, origin=before.origin)


if __name__ == "__main__":
    raise SystemExit(main())
