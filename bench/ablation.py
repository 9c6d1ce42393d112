"""What each part of the method is worth: a page is learned with it and without, at equal steps.

    python -m bench.ablation --json --text BOOK.txt

The default learns a page, its paragraphs and passages, with extractive queries, memory tokens in every layer and the
cycle, under the momentum coupling with 4 side bits. Each arm changes one thing; the seeds have pages of their own. In
the end the whole page is asked for: `expand_nats` from its query, `cycle_nats` from its memory, `compress_nats` of its
query given its memory (nats a token), and whether greedy recall and expansion give it back. The differences to the
default are paired by seed, with the interval of 95 % of Student's t. All arms learn without the term that keeps the
perplexity of other text. Nothing says a query given a memory that is matched: forward nothing learns there.

With --output, the same command goes on where it was interrupted.
"""

import argparse
import contextlib
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from r3mem_fast import R3MemConfig, R3MemPipeline, RememberSettings, load_model
from r3mem_fast.data.text import pages_of, read_text
from r3mem_fast.hierarchy import LEVELS, InstructBuilder
from r3mem_fast.objective import term_weights
from r3mem_fast.reversible.convert import stack_of
from r3mem_fast.reversible.stack import Mode
from r3mem_fast.training.collate import collate_ids

from .records import add_output_option, add_record
from .unfinished import Unfinished, settings_of

DEFAULT = "default"
# What an arm changes, as arguments of `_learned`: settings of the config; levels; whether an instruct model writes the
# queries; whether the network is the ordinary one.
ARMS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "document level alone": {"levels": ("document",)},
    "queries by an instruct model": {"instruct": True},
    "memory at the input": {"config": {"memory_placement": "input"}},
    "matched memory": {"config": {"memory_writer": "matched", "adapter_rows": "memory"}},
    "without the cycle": {"config": {"cycle_weight": 0.0}},
    "without momentum": {"plain": True},
}
_MEASURES = ("expand_nats", "cycle_nats", "compress_nats")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.ablation", description=__doc__.split("\n")[0])
    parser.add_argument("--arm", nargs="+", choices=list(ARMS), default=list(ARMS), help="(all)")
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder or a hub id (%(default)s)")
    parser.add_argument("--instruct-model", default="smollm2-135m", help="that writes queries (%(default)s)")
    parser.add_argument("--text", help="a UTF-8 text with the pages (Python's help topics)")
    parser.add_argument("--tokens", type=int, default=100, help="of a page, about (%(default)s)")
    parser.add_argument("--memory-tokens", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="(%(default)s)")
    parser.add_argument(
        "--seeds", type=int, choices=range(1, 11), default=3, metavar="N", help="1 to 10 (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    records: list[dict] = []
    found: dict[tuple[str, int], dict[str, Any]] = {}
    text = read_text(options.text)
    unfinished = Unfinished(options.output, settings_of(options), batch=1, progress=False)
    for arm in options.arm:
        for seed in range(options.seeds):
            found[arm, seed] = unfinished.once(
                arm, seed, lambda arm=arm, seed=seed: _learned(options, text, seed, **ARMS[arm])
            )
            add_record({"arm": arm, "seed": seed, **found[arm, seed]}, records, options)
    for arm in options.arm:
        if arm != DEFAULT and DEFAULT in options.arm and options.seeds > 1:
            differences = {
                name: _interval([found[arm, s][name] - found[DEFAULT, s][name] for s in range(options.seeds)])
                for name in _MEASURES
                if name in found[arm, 0]
            }
            add_record({"arm": arm, "minus": DEFAULT, **differences}, records, options)
    unfinished.remove()
    return 0


def _learned(
    options: argparse.Namespace,
    text: str,
    seed: int,
    config: dict[str, Any] | None = None,
    levels: Sequence[str] = LEVELS,
    instruct: bool = False,
    plain: bool = False,
) -> dict[str, Any]:
    """Learn a page for the number of steps in `options`, and return the record of what is known of it then."""
    settings = {"num_memory_tokens": options.memory_tokens, "segment_length": 2 * options.tokens, **(config or {})}
    pipeline = R3MemPipeline(options.model, config=R3MemConfig(**settings), seed=seed)
    page = pages_of(text, pipeline.tokenizer, 1, tokens=options.tokens, offset=100 + seed)
    builder = InstructBuilder(*load_model(options.instruct_model)) if instruct else None
    training = RememberSettings(max_steps=options.steps, seed=seed, divergence=None)
    with _ordinary(pipeline.model) if plain else contextlib.nullcontext():
        report = pipeline.remember(page, settings=training, builder=builder, levels=levels, progress=not options.json)
        pair = next(pair for pair in report.pairs if pair.level == "document")
        context = pipeline.codec.ids(pair.context)
        batch = collate_ids([(context, pipeline.codec.ids(pair.query))])
        batch = {name: tensor.to(pipeline.model.device) for name, tensor in batch.items()}
        with torch.no_grad():
            output = pipeline.model(**batch, terms=list(term_weights(pipeline.model)))
        losses = {name: getattr(output, name.replace("nats", "loss")) for name in _MEASURES}
        memory = pipeline.model.compress(batch["input_ids"], finish=True)
        asked: dict[str, Any] = {"max_new_tokens": len(context) + 1}
        recalled = pipeline.model.recall(batch["query_input_ids"], **asked)[0].tolist()
        expanded = pipeline.model.expand(memory, **asked)[0].tolist()
    return {
        "context_tokens": len(context),
        "contexts": len(report.pairs),
        "steps": report.steps,
        "seconds": round(report.seconds, 1),
        **{name: round(loss.item(), 4) for name, loss in losses.items() if loss is not None},
        "recalled": recalled == context,
        "expanded": expanded == context,
        "query_builder": pair.builder,
    }


@contextlib.contextmanager
def _ordinary(model: torch.nn.Module) -> Iterator[None]:
    """Run the same adapters in the ordinary network, which stores its activations."""
    with stack_of(model).in_mode(Mode.PLAIN):
        yield


def _interval(differences: list[float]) -> dict[str, float]:
    """Return the mean and its interval of 95 % of Student's t, for 2 to 10 seeds."""
    quantile = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)[len(differences) - 2]
    mean = statistics.fmean(differences)
    half = quantile * statistics.stdev(differences) / math.sqrt(len(differences))
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}


if __name__ == "__main__":
    raise SystemExit(main())
