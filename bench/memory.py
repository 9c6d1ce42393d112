"""Memories on a real model: histories of any length, batches of different memories, and the file.

    python -m bench.memory --json                    # every suite
    python -m bench.memory --suite stream --tokens 100000 --text BOOK.txt

Suites:

- `stream`: a long text compressed in one process; half of it in another one, saved, loaded in a third and gone on
  from. A record each, with tokens a second and the resident memory along the way, and one that compares the memories
  bit for bit.
- `batch`: eight rows of different lengths behind eight different memories, in both placements, padded on either side:
  the largest difference of any logit from those of the row alone, in float32, beside the largest logit, and beside the
  same difference of the base model without any memory.
- `file`: bytes, milliseconds of saving and loading, and a thousand corruptions of a file: how many were refused, each
  with a ValueError or OSError.

The adapters are new ones (what is measured does not depend on what they have learned).
"""

import argparse
import concurrent.futures
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from r3mem_fast import Memory, R3MemConfig, R3MemModel, load_model
from r3mem_fast.choices import PLACEMENTS
from r3mem_fast.data.text import read_text
from r3mem_fast.devices import default_dtype
from r3mem_fast.training.collate import padded

from .records import add_output_option, add_record

SUITES = ("stream", "batch", "file")
_HISTORIES = (0, 40, 256, 300, 600, 1024, 1300, 90)
_PROMPTS = (1, 17, 60, 5, 33, 48, 9, 25)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES), help="(all)")
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder or a hub id (%(default)s)")
    parser.add_argument("--text", help="a UTF-8 text (Python's help topics)")
    parser.add_argument("--tokens", type=int, default=100_000, help="of the suite stream (%(default)s)")
    parser.add_argument("--memory-tokens", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--segment-length", type=int, default=256, help="in tokens (%(default)s)")
    parser.add_argument("--corruptions", type=int, default=1000, help="of the suite file (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    records: list[dict] = []
    for suite in options.suite:
        for record in globals()[f"_{suite}"](options):
            add_record({"suite": suite, **record}, records, options)
    return 0 if all(record.get("passed", True) for record in records) else 1


def _model(options: argparse.Namespace, dtype: torch.dtype | None = None, **settings: Any) -> tuple[R3MemModel, Any]:
    """Return a model with untrained adapters, and its tokenizer."""
    base, tokenizer = load_model(options.model, dtype=dtype or default_dtype("cpu"))
    torch.manual_seed(0)
    config = R3MemConfig(num_memory_tokens=options.memory_tokens, segment_length=options.segment_length, **settings)
    return R3MemModel(base, config).eval(), tokenizer


def _ids(options: argparse.Namespace, tokenizer: Any, tokens: int) -> torch.Tensor:
    """Return the text's first tokens, int64 `[1, tokens]`."""
    ids = tokenizer(read_text(options.text), add_special_tokens=False, verbose=False).input_ids
    if len(ids) < tokens:
        raise ValueError(f"the text has {len(ids)} tokens; {tokens} are needed")
    return torch.tensor([ids[:tokens]])


def _stream(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Compress a text in one process, and in two; yield a record each, and a comparison."""
    with tempfile.TemporaryDirectory() as folder:
        whole, first, second = (str(Path(folder) / name) for name in ("whole", "first", "second"))
        half = options.tokens // 2 + 100  # not at the end of a segment
        for part, given in (
            ("uninterrupted", (0, options.tokens, None, whole)),
            ("first half", (0, half, None, first)),
            ("second half, in another process", (half, options.tokens, first, second)),
        ):
            # Each part has a process of its own, so that none sees another's memory and state.
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
                yield {"part": part, **pool.submit(_compressed, options, *given).result()}
        expected, found = (Memory.load(path) for path in (whole, second))
        same = expected.origin == found.origin and all(
            torch.equal(found.tensors()[name], tensor) for name, tensor in expected.tensors().items()
        )
        yield {"part": "second half against uninterrupted", "passed": same, "bit_for_bit": same}


def _compressed(options: argparse.Namespace, start: int, end: int, before: str | None, output: str) -> dict[str, Any]:
    """Compress tokens of the text, behind the memory in the file `before`, into a file; return what it took."""
    model, tokenizer = _model(options)
    ids = _ids(options, tokenizer, end)[:, start:]
    memory: Any = None if before is None else Memory.load(before, model=model)
    resident, seconds = [], 0.0
    for piece in ids.split(-(-ids.shape[1] // 10), dim=1):
        started = time.perf_counter()
        memory = model.compress(piece, memory=memory)
        seconds += time.perf_counter() - started
        resident.append(round(psutil.Process().memory_info().rss / 1e6, 1))
    memory.save(output)
    return {
        "tokens": end - start,
        "segments": memory.num_segments.item(),
        "tokens_per_second": round((end - start) / seconds, 1),
        "resident_mb": resident,
        # Growth after the first tenth, which brings in what every later one needs too.
        "growth": round(resident[-1] / resident[0], 4),
        "memory_bytes": memory.nbytes,
    }


def _batch(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Compare the logits of a batch behind different memories with those of each row alone."""
    for placement in PLACEMENTS:
        model, tokenizer = _model(options, torch.float32, memory_placement=placement, max_memory_segments=2)
        text = _ids(options, tokenizer, sum(_HISTORIES) + sum(_PROMPTS))[0]
        pieces = text.split([*_HISTORIES, *_PROMPTS])
        prompts = [piece.tolist() for piece in pieces[len(_HISTORIES) :]]
        alone = [model.compress(*padded([piece.tolist()])) for piece in pieces[: len(_HISTORIES)]]
        together = Memory.cat(alone)
        ids, mask = padded(prompts)
        order = mask.argsort(dim=1, stable=True)  # padding first
        with torch.no_grad():
            expected = [model(torch.tensor([row]), memory=m).logits[0] for row, m in zip(prompts, alone, strict=True)]
            for padding, (rows, masks) in (
                ("right", (ids, mask)),
                ("left", (ids.gather(1, order), mask.gather(1, order))),
            ):
                logits = model(rows, masks, memory=together).logits
                difference = _largest(logits, masks, expected)
                yield {
                    "placement": placement,
                    "padding": padding,
                    "rows": len(prompts),
                    "max_abs_difference": difference,
                    "largest_logit": max(row.abs().max().item() for row in expected),
                    "same_argmax": all(
                        torch.equal(logits[i, masks[i].bool()].argmax(-1), row.argmax(-1))
                        for i, row in enumerate(expected)
                    ),
                }
            with model.disable_adapters():
                single = [model(torch.tensor([row])).logits[0] for row in prompts]
                difference = _largest(model(ids, mask).logits, mask, single)
        yield {"placement": placement, "padding": "right", "base_model_without_memory": True,
               "max_abs_difference": difference}  # fmt: skip


def _largest(logits: torch.Tensor, mask: torch.Tensor, expected: list[torch.Tensor]) -> float:
    """Return the largest difference of a logit at a token from that of the row alone."""
    return max((logits[i, mask[i].bool()] - row).abs().max().item() for i, row in enumerate(expected))


def _file(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time saving and loading, and load damaged files."""
    model, tokenizer = _model(options)
    length = options.segment_length
    ids = _ids(options, tokenizer, 3 * length + 50).expand(4, -1)
    memory = model.compress(ids).labelled([("document", f"row {row}") for row in range(4)])
    with tempfile.TemporaryDirectory() as folder:
        good, bad = Path(folder) / "good", Path(folder) / "bad"
        memory.save(good)
        times = {
            "save_ms": _median_ms(lambda: memory.save(good)),
            "load_ms": _median_ms(lambda: Memory.load(good)),
            "load_for_model_ms": _median_ms(lambda: Memory.load(good, model=model)),
        }
        yield {"rows": 4, "file_bytes": good.stat().st_size, **times}
        yield _corrupted(options, model, memory, good, bad)


def _corrupted(
    options: argparse.Namespace, model: R3MemModel, memory: Memory, good: Path, bad: Path
) -> dict[str, Any]:
    """Load damaged files, each of which must raise ValueError or OSError; return how many did, with examples."""
    data, draw = good.read_bytes(), random.Random(0)
    assert model.memory_embeddings is not None
    with torch.no_grad():  # make another model, and a memory of it
        model.memory_embeddings.neg_()
        model.compress(torch.ones(4, 3 * options.segment_length + 50, dtype=torch.int64)).save(bad)
        model.memory_embeddings.neg_()
    other = bad.read_bytes()
    header, other_header = (8 + int.from_bytes(content[:8], "little") for content in (data, other))

    def flipped() -> bytes:
        content = bytearray(data)
        for _ in range(draw.choice((1, 2, 8))):
            content[draw.randrange(draw.choice((header, len(data))))] ^= 1 << draw.randrange(8)
        return bytes(content)

    kinds = {
        "flipped bits": flipped,
        "truncated": lambda: data[: draw.randrange(len(data))],
        "another's header": lambda: other[:other_header] + data[header:],
        "another's data": lambda: data[:header] + other[other_header:],
        "another model's file": lambda: other,
    }
    refused, examples = dict.fromkeys(kinds, 0), {}
    tried = dict.fromkeys(kinds, 0)
    for number in range(options.corruptions):
        kind = list(kinds)[number % len(kinds)]
        content = kinds[kind]()
        if content == data:  # a bit was flipped twice
            continue
        bad.write_bytes(content)
        tried[kind] += 1
        try:
            Memory.load(bad, model=model)
        except (ValueError, OSError) as error:
            refused[kind] += 1
            examples[kind] = str(error).replace(str(bad), "FILE")
    return {
        "corruptions": sum(tried.values()),
        "refused": sum(refused.values()),
        "by_kind": refused,
        "errors": examples,
        "whole_one_loads": torch.equal(Memory.load(good, model=model).states, memory.states),
        "passed": tried == refused,
    }


def _median_ms(run: Callable[[], object]) -> float:
    """Return the median time of a call, in milliseconds."""
    seconds = []
    for _ in range(21):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return round(1000 * statistics.median(seconds), 3)


if __name__ == "__main__":
    raise SystemExit(main())
