"""Memories of an adapter of anchors, to be read by the base model beside matched ones.

    python -m bench.anchored FOLDER OUTPUT --memory-allocation adaptive

saves an adapter of anchors for memories of another allocation, with the same weights, so that it can be trained on.
"""

import argparse
import dataclasses
from collections.abc import Sequence

import torch

from r3mem_fast import Memory, R3MemModel, R3MemPipeline, load_model
from r3mem_fast.adapter_folder import put_weights, weights_of
from r3mem_fast.choices import ALLOCATIONS
from r3mem_fast.memory import MemoryLayout

from .rivals import laid_out


def main(arguments: Sequence[str] | None = None) -> int:
    """Save the adapter that the command line asks for, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.anchored", description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="folder of the adapter")
    parser.add_argument("output", help="folder of the other one")
    parser.add_argument("--memory-allocation", choices=ALLOCATIONS, required=True, help="of its memories")
    parser.add_argument("--model", default="smollm2-135m", help="its base model (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="(%(default)s)")
    options = parser.parse_args(arguments)
    base, _ = load_model(options.model, dtype=options.dtype)
    learned = load_adapter(options.folder, R3MemModel(base), anchored=True)
    config = dataclasses.replace(learned.r3mem_config, memory_allocation=options.memory_allocation)
    other = R3MemModel(load_model(options.model, dtype=options.dtype)[0], config)
    put_weights(other, weights_of(learned))
    other.save_pretrained(options.output)
    return 0


def load_adapter(folder: str, model: R3MemModel, *, anchored: bool = False) -> R3MemModel:
    """Load an adapter with memory tokens.

    Args:
        folder: Its folder.
        model: The model that it is compared with.
        anchored: Whether it must be one of anchors.

    Raises:
        ValueError: It was made of another model, or is none of anchors.
    """
    learned = R3MemPipeline(folder, dtype=str(model.dtype).removeprefix("torch.")).model
    if anchored and not learned.is_anchored:
        raise ValueError(f"{folder} holds no adapter of anchors (memory_writer='anchored')")
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
    with laid_out(learned, layout):
        before = dataclasses.replace(start, layout=layout, origin=learned.origin())
        memory = learned.compress(ids, memory=before, finish=True)
    return dataclasses.replace(memory, origin=start.origin)


if __name__ == "__main__":
    raise SystemExit(main())
