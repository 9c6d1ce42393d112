"""Expanding memories: what comes back from a memory alone, with controls that tell the memory from the adapter.

    python -m bench.expand --json                    # every suite
    python -m bench.expand --suite unseen --text BOOK.txt OTHER.txt --held-out THIRD.txt

Suites, of which each prints a record an arm:

- `seen`: documents that are learned until each comes back from its memory, in both placements. Then the greedy
  expansions of their memories, of the same with zeros in place of their states, and of another document's.
- `unseen`: windows of texts, new ones in every step, each to be expanded from the memory of it; then windows of
  another text, with the same controls. The edit distance to the window is Levenshtein's, in tokens, over the longer
  of the two; differences are paired by window, with a bootstrapped confidence interval of 95 %.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from r3mem_fast import R3MemConfig, R3MemModel, R3MemPipeline, RememberSettings, check_integrity, load_model
from r3mem_fast.choices import MEMORY_KINDS, PLACEMENTS
from r3mem_fast.data.text import pages_of, read_text, token_windows
from r3mem_fast.devices import default_dtype
from r3mem_fast.training.collate import collate_ids

from .records import add_output_option, add_record

SUITES = ("seen", "unseen")
CONTROLS = ("own memory", "zeroed memory", "another's memory")
_RESAMPLES = 10_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.expand", description=__doc__.split("\n")[0])
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES), help="(all)")
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder or a hub id (%(default)s)")
    parser.add_argument("--text", nargs="+", default=[None], help="UTF-8 texts to learn from (Python's help topics)")
    parser.add_argument("--held-out", help="a UTF-8 text for unseen windows (the last tenth of the last text)")
    parser.add_argument("--memory-tokens", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--memory-writer", choices=MEMORY_KINDS, default="tokens", help="(%(default)s)")
    parser.add_argument("--documents", type=int, default=20, help="of the suite seen (%(default)s)")
    parser.add_argument("--tokens", type=int, default=100, help="of such a document, about (%(default)s)")
    parser.add_argument("--max-steps", type=int, default=600, help="of the same (%(default)s)")
    parser.add_argument("--window", type=int, default=32, help="of the suite unseen, in tokens (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="of its windows in a step (%(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of it (%(default)s)")
    parser.add_argument("--windows", type=int, default=200, help="unseen ones (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    bench = _Bench(options)
    for suite in options.suite:
        getattr(bench, suite)()
    return 0


class _Bench:
    """Runs the suites, each by the method of its name."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self._add_record = options, functools.partial(add_record, records=[], options=options)
        self.texts = [read_text(path) for path in options.text]
        self.names = ["Python's help topics" if path is None else Path(path).name for path in options.text]
        if options.held_out:
            self.held_out = read_text(options.held_out)
        else:
            last = self.texts[-1]
            self.texts[-1], self.held_out = last[: -len(last) // 10], last[-len(last) // 10 :]

    def seen(self) -> None:
        """Learn documents until each comes back from its memory, and expand their memories."""
        options = self.options
        for placement in PLACEMENTS if options.memory_writer == "tokens" else PLACEMENTS[:1]:
            config = self._config(memory_placement=placement, segment_length=2 * options.tokens)
            pipeline = R3MemPipeline(options.model, config=config, seed=options.seed)
            pages = pages_of(self.texts[0], pipeline.tokenizer, options.documents, tokens=options.tokens, offset=20)
            settings = RememberSettings(max_steps=options.max_steps, tokens_per_step=4 * options.tokens)
            report = pipeline.remember(pages, settings=settings, levels=("document",), progress=not options.json)
            rows = [pipeline.codec.ids(pair.context) for pair in report.pairs]
            loss = report.cycle_loss and round(report.cycle_loss, 4)
            details = {
                "texts": self.names[:1],
                "steps": report.steps,
                "seconds": round(report.seconds, 1),
                "loss": loss,
            }
            self._evaluate("seen", placement, pipeline.model, rows, details)

    def unseen(self) -> None:
        """Learn to expand windows of texts, and expand the memories of windows of another text."""
        options = self.options
        base, tokenizer = load_model(options.model, dtype=default_dtype("cpu"))
        torch.manual_seed(options.seed)
        model = R3MemModel(base, self._config(segment_length=options.window))
        windows = torch.cat([token_windows(tokenizer, text, tokens=options.window) for text in self.texts])
        started = time.perf_counter()
        losses = self._train(model, windows)
        details = {
            "texts": self.names,
            "held_out": Path(options.held_out).name if options.held_out else "the last tenth",
            "steps": options.steps,
            "batch": options.batch,
            "seconds": round(time.perf_counter() - started, 1),
            "loss": round(statistics.fmean(losses[-50:]), 4),
        }
        unseen = token_windows(tokenizer, self.held_out, tokens=options.window)
        step = max(1, len(unseen) // options.windows)
        self._evaluate("unseen", "every_layer", model.eval(), unseen[::step][: options.windows].tolist(), details)

    def _config(self, **settings: Any) -> R3MemConfig:
        """Return settings with the objective's third term alone.

        What the forward direction says without a memory stays as it was, as the adapters act on memories alone.
        """
        return R3MemConfig(
            num_memory_tokens=self.options.memory_tokens,
            memory_writer=self.options.memory_writer,
            adapter_rows="memory",
            compress_weight=0.0,
            expand_weight=0.0,
            **settings,
        )

    def _train(self, model: R3MemModel, windows: torch.Tensor) -> list[float]:
        """Train by AdamW, on each window once and then again in another order; return the losses."""
        options = self.options
        losses: list[float] = []
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
        warm_up = min(50, options.steps // 2)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / (warm_up + 1), (options.steps - step) / max(1, options.steps - warm_up)),
        )
        generator = torch.Generator().manual_seed(options.seed)
        order: list[int] = []
        model.train()
        with tqdm(range(options.steps), desc="Learning", unit="step", disable=options.json) as progress:
            for _ in progress:
                if len(order) < options.batch:
                    order = torch.randperm(len(windows), generator=generator).tolist()
                batch = [(windows[order.pop()].tolist(), [0]) for _ in range(min(options.batch, len(order)))]
                loss = model(**collate_ids(batch), terms=["cycle"]).loss
                loss.backward()
                check_integrity(model.peft_model)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                losses.append(loss.item())
                progress.set_postfix(loss=statistics.fmean(losses[-20:]))
        return losses

    def _evaluate(
        self, suite: str, placement: str, model: R3MemModel, rows: list[list[int]], details: dict[str, Any]
    ) -> None:
        """Expand the memory of each row, and the controls; print a record of each."""
        expanded: dict[str, list[list[int]]] = {control: [] for control in CONTROLS}
        for start in range(0, len(rows), 20):
            batch = collate_ids([(row, [0]) for row in rows[start : start + 20]])
            memory = model.compress(batch["input_ids"], batch["attention_mask"], finish=True)
            zeroed = dataclasses.replace(memory, states=torch.zeros_like(memory.states))
            others = memory.rows([(row + 1) % len(memory) for row in range(len(memory))])
            for control, given in zip(CONTROLS, (memory, zeroed, others), strict=True):
                found = model.expand(given, max_new_tokens=batch["input_ids"].shape[1] + 1)
                expanded[control] += [ids.tolist() for ids in found]
        distances = {
            control: torch.tensor([_distance(ids, row) for ids, row in zip(found, rows, strict=True)])
            for control, found in expanded.items()
        }
        for control, texts in expanded.items():
            record = {
                "suite": suite,
                "placement": placement,
                "control": control,
                "rows": len(rows),
                "tokens": sum(map(len, rows)),
                "memory_tokens": self.options.memory_tokens,
                "writer": self.options.memory_writer,
                "exact": sum(ids == row for ids, row in zip(texts, rows, strict=True)),
                "edit_distance": round(distances[control].mean().item(), 4),
                **details,
            }
            if control != CONTROLS[0]:
                mean, low, high = _interval(distances[control] - distances[CONTROLS[0]], self.options.seed)
                record["more_than_own"] = {"mean": mean, "ci95": [low, high]}
            self._add_record(record)


def _distance(found: list[int], wanted: list[int]) -> float:
    """Return Levenshtein's distance over the length of the longer: 0 for the same, 1 for nothing in common."""
    row = list(range(len(wanted) + 1))
    for i, token in enumerate(found):
        last, row[0] = row[0], i + 1
        for j, other in enumerate(wanted):
            last, row[j + 1] = row[j + 1], min(row[j + 1] + 1, row[j] + 1, last + (token != other))
    return row[-1] / max(1, len(found), len(wanted))


def _interval(differences: torch.Tensor, seed: int) -> tuple[float, ...]:
    """Return the mean of paired differences, and the bootstrapped interval that holds it with 95 %."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(differences), (_RESAMPLES, len(differences)), generator=generator)
    low, high = differences[picks].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return tuple(round(value, 4) for value in (differences.mean().item(), low, high))


if __name__ == "__main__":
    raise SystemExit(main())
