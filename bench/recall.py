"""Remembering pages of a book and recalling them backward: exact match, with controls that tell memory from leakage.

    python -m bench.recall --json                    # every suite
    python -m bench.recall --suite pages --pages 20 --text BOOK.txt

Suites, of which each prints one record an arm and seed:

- `page`: one page in an adapter; `three`: three pages. Exact match by level, seconds, and the perplexity of held-out
  text with the adapter on over the base model's.
- `pages`: many pages in one adapter, and the controls: adapters off (backward, and forward in the base model), queries
  with their entities swapped for another page's, the first half of each query, queries of pages never seen.
- `shelf`: as many pages apart, an adapter each (`AdapterShelf`); then more, one by one, and after each of them the
  first page again; the same controls in the end.
- `arms`: the same pages and steps for the default, the forward direction, the inverse form, and other cores.
- `adapters`: one adapter for both directions against two of half the rank, at the same steps.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import math
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from r3mem_fast import AdapterShelf, PairCollator, R3MemConfig, R3MemPipeline, RememberReport, RememberSettings
from r3mem_fast.codec import TextCodec
from r3mem_fast.data.text import pages_of, read_text, token_windows
from r3mem_fast.hierarchy import Pair, build_pairs
from r3mem_fast.hierarchy.decoys import swap_entities
from r3mem_fast.hierarchy.pairs import mentioned

from .records import add_output_option, add_record

SUITES = ("page", "three", "pages", "shelf", "arms", "adapters")
_HELD_OUT_WINDOWS, _HELD_OUT_TOKENS = 12, 256
# Queries of most controls: reading them takes as long as learning a few pages.
_CONTROL_QUERIES = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.recall", description=__doc__.split("\n")[0])
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES), help="(all)")
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder or a hub id (%(default)s)")
    parser.add_argument("--text", help="a UTF-8 text with the pages (Python's help topics)")
    parser.add_argument("--held-out", help="a UTF-8 text for the perplexity (the end of the text)")
    parser.add_argument("--tokens", type=int, default=200, help="of a page, about (%(default)s)")
    parser.add_argument("--pages", type=int, default=20, help="of the suites pages and shelf (%(default)s)")
    parser.add_argument("--arm-pages", type=int, default=1, help="of the suites arms and adapters (%(default)s)")
    parser.add_argument("--arm-steps", type=int, default=60, help="of the same (%(default)s)")
    parser.add_argument("--max-steps", type=int, default=2000, help="of the others (%(default)s)")
    parser.add_argument("--tokens-per-step", type=int, default=320, help="of the suite pages (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="of the suites page, arms and adapters (%(default)s)")
    parser.add_argument("--added", type=int, default=10, help="pages of the suite shelf, one by one (%(default)s)")
    parser.add_argument("--lora-r", type=int, help="rank of the adapters of the suites page and shelf (the default's)")
    parser.add_argument("--folder", help="keep checkpoints of the suites pages and shelf here, and go on from them")
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
        self.text = read_text(options.text)
        self.held_out_text = read_text(options.held_out) if options.held_out else self.text[-len(self.text) // 10 :]
        self.book = self.text if options.held_out else self.text[: -len(self.text) // 10]

    def page(self) -> None:
        """Remember one page, another one for every seed."""
        for seed in range(self.options.seeds):
            pipeline = self._pipeline(seed, self._ranked())
            pages = self._pages(pipeline, 1, seed)
            report = self._remember(pipeline, pages, seed)
            self._add("page", "default", seed, report, pipeline, lora_r=pipeline.model.r3mem_config.lora_r)

    def three(self) -> None:
        """Remember three pages."""
        pipeline = self._pipeline(0)
        report = self._remember(pipeline, self._pages(pipeline, 3, 50), 0)
        self._add("three", "default", 0, report, pipeline)

    def pages(self) -> None:
        """Remember many pages, and ask for what must not come back."""
        pipeline = self._pipeline(0)
        count = self.options.pages
        pages = self._pages(pipeline, count + 5, 200)
        # Many pages fill larger batches, and an epoch of them takes less time.
        report = self._remember(
            pipeline,
            dict(list(pages.items())[:count]),
            0,
            folder=self.options.folder,
            tokens_per_step=self.options.tokens_per_step,
        )
        self._add("pages", "default", 0, report, pipeline)
        unseen = build_pairs(dict(list(pages.items())[count:]), pipeline.tokenizer)
        for record in _controls(pipeline, report.pairs, unseen):
            self._add_record({"suite": "pages", "seed": 0, "pages": count, **record})

    def shelf(self) -> None:
        """Remember pages apart, add more of them one by one, and ask for all, and for what must not come back."""
        options, pipeline = self.options, self._pipeline(0)
        count, added = options.pages, options.added
        pages = self._pages(pipeline, count + added + 5, 200)
        names = list(pages)
        with contextlib.ExitStack() as stack:
            folder = options.folder or stack.enter_context(tempfile.TemporaryDirectory())
            shelf = AdapterShelf(Path(folder) / "shelf", options.model, config=self._ranked())
            pairs: list[Pair] = []
            for number, name in enumerate(names[: count + added], 1):
                settings = RememberSettings(max_steps=options.max_steps)
                report = shelf.remember({name: pages[name]}, settings=settings, progress=not options.json).get(name)
                asked = [pair.query for pair in pairs]
                pairs += build_pairs({name: pages[name]}, pipeline.tokenizer, taken=asked)
                if report is not None:  # else it was there from an earlier run
                    about = {"suite": "shelf", "document": name, "documents": number}
                    self._add_record({**about, **_of_run(report), **self._of_adapter(shelf, name)})
                if number > count:
                    first = _exact(shelf, [pair for pair in pairs if pair.document == names[0]])
                    self._add_record({"suite": "shelf", "asked": "the first page", "documents": number, **first})
                if number in (count, count + added):
                    self._add_record({"suite": "shelf", "asked": "all", "documents": number, **_exact(shelf, pairs)})
            unseen = build_pairs({name: pages[name] for name in names[count + added :]}, pipeline.tokenizer)
            for record in _misleading(shelf.recall, pipeline.codec, pairs, unseen):
                self._add_record({"suite": "shelf", "documents": count + added, **record})

    def arms(self) -> None:
        """Compare directions and cores, at the same pages and steps."""
        depth = self._pipeline(0).model.config.num_hidden_layers
        default: Any = R3MemConfig().resolved(depth).core  # (first, last) of a resolved config
        arms: dict[str, dict[str, Any]] = {
            "reversed": {},
            "inverse": {"backward": "inverse"},
            "reversed, the inverse's core": {"core": R3MemConfig(backward="inverse").resolved(depth).core},
            # One layer backward is the forward direction; the adapters stay where they are.
            "forward": {"core": (default[0], default[0] + 1), "first_adapted_layer": default[0]},
            "reversed, all layers": {"core": "all", "first_adapted_layer": default[0]},
        }
        for seed in range(self.options.seeds):
            for name, settings in arms.items():
                config = R3MemConfig(**settings)
                pipeline = self._pipeline(seed, config)
                pages = self._pages(pipeline, self.options.arm_pages, 100 + seed)
                report = self._remember(pipeline, pages, seed, max_steps=self.options.arm_steps)
                core: Any = pipeline.model.r3mem_config.core
                self._add("arms", name, seed, report, pipeline, core=list(core))

    def adapters(self) -> None:
        """Compare one adapter with two of half the rank: one learns only to expand, the other only to compress."""
        steps = self.options.arm_steps
        arms: dict[str, dict[str, Any]] = {
            "one adapter": {"lora_r": 16, "lora_alpha": 32},
            "two adapters: expand": {"lora_r": 8, "lora_alpha": 16, "compress_weight": 0.0},
            "two adapters: compress": {"lora_r": 8, "lora_alpha": 16, "expand_weight": 0.0},
        }
        for seed in range(self.options.seeds):
            for name, settings in arms.items():
                pipeline = self._pipeline(seed, R3MemConfig(**settings))
                pages = self._pages(pipeline, self.options.arm_pages, 120 + seed)
                report = self._remember(pipeline, pages, seed, max_steps=steps, compress_every=2)
                compress = _compress_loss(pipeline, report.pairs)
                self._add("adapters", name, seed, report, pipeline, lora_r=settings["lora_r"], compress_loss=compress)

    def _ranked(self) -> R3MemConfig | None:
        return None if self.options.lora_r is None else R3MemConfig(lora_r=self.options.lora_r)

    def _of_adapter(self, shelf: AdapterShelf, name: str) -> dict[str, Any]:
        """What an adapter of a shelf takes on the disk, and does to other text while it is on."""
        with shelf.adapter(name) as pipeline:
            assert pipeline.folder is not None
            return {
                "bytes": sum(path.stat().st_size for path in pipeline.folder.iterdir()),
                "perplexity_ratio": round(self._perplexity_ratio(pipeline), 4),
            }

    def _pipeline(self, seed: int, config: R3MemConfig | None = None) -> R3MemPipeline:
        return R3MemPipeline(self.options.model, config=config, seed=seed)

    def _remember(
        self, pipeline: R3MemPipeline, pages: dict[str, str], seed: int, *, folder: str | None = None, **settings: Any
    ) -> Any:
        settings = {"max_steps": self.options.max_steps, **settings}
        return pipeline.remember(
            pages, folder=folder, settings=RememberSettings(seed=seed, **settings), progress=not self.options.json
        )

    def _pages(self, pipeline: R3MemPipeline, count: int, offset: int) -> dict[str, str]:
        return pages_of(self.book, pipeline.tokenizer, count, tokens=self.options.tokens, offset=offset)

    def _add(self, suite: str, arm: str, seed: int, report: Any, pipeline: R3MemPipeline, **details: Any) -> None:
        """Add the record of what was remembered."""
        self._add_record(
            {
                "suite": suite,
                "arm": arm,
                "seed": seed,
                "documents": len({pair.document for pair in report.pairs}),
                "context_tokens": sum(len(pipeline.codec.ids(pair.context)) for pair in report.pairs),
                **_of_run(report),
                "expand_loss": report.expand_loss and round(report.expand_loss, 4),
                "perplexity_ratio": round(self._perplexity_ratio(pipeline), 4),
                **details,
            }
        )

    def _perplexity_ratio(self, pipeline: R3MemPipeline) -> float:
        """Return the perplexity of held-out text over the base model's."""
        tokens = min(_HELD_OUT_TOKENS, pipeline.model.max_tokens or _HELD_OUT_TOKENS)
        windows = token_windows(pipeline.tokenizer, self.held_out_text, tokens=tokens, count=_HELD_OUT_WINDOWS)

        def loss() -> float:
            with torch.no_grad():
                return statistics.fmean(pipeline.model(w[None], labels=w[None]).loss.item() for w in windows)

        with pipeline.model.disable_adapters():
            base = loss()
        return math.exp(loss() - base)


def _of_run(report: RememberReport) -> dict[str, Any]:
    """What a run has learned, and what it took."""
    return {
        "exact": sum(report.exact),
        "total": len(report.exact),
        "levels": {level: {"exact": n, "total": total} for level, (n, total) in report.by_level().items()},
        "steps": report.steps,
        "seconds": round(report.seconds, 1),
    }


def _exact(shelf: AdapterShelf, pairs: Sequence[Pair]) -> dict[str, int]:
    """How many of the contexts come back when a shelf is asked for all of them."""
    found = shelf.recall([pair.query for pair in pairs])
    exact = sum(text == pair.context for text, pair in zip(found, pairs, strict=True))
    return {"exact": exact, "total": len(pairs)}


def _controls(pipeline: R3MemPipeline, pairs: Sequence[Pair], unseen: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    """Yield a record for each way of asking in which contexts must not come back, or need not."""
    asked = [(pair.query, pair.context) for pair in pairs]
    codec, forward = pipeline.codec, functools.partial(_read_forward, pipeline)
    with pipeline.model.peft_model.disable_adapter():
        yield _control("adapters off, backward", asked, codec, pipeline.recall)
    with pipeline.model.disable_adapters():
        yield _control("adapters off, forward", asked, codec, forward)
    yield _control("forward, adapters on", asked, codec, forward)
    yield from _misleading(pipeline.recall, codec, pairs, unseen)


def _misleading(
    recall: Callable[..., Any], codec: TextCodec, pairs: Sequence[Pair], unseen: Sequence[Pair]
) -> Iterator[dict[str, Any]]:
    """Yield a record for each kind of query that was not learned."""
    queries = {pair.query for pair in pairs}
    queries_swapped = ((_swapped(pair, pairs), pair.context) for pair in pairs)
    swapped = [(query, context) for query, context in queries_swapped if query is not None and query not in queries]
    # Ask all of them, because the claim is that none comes back.
    yield _control("entities swapped", swapped, codec, recall, queries=len(swapped))
    halves = [(pair.query[: len(pair.query) // 2].rsplit(" ", 1)[0], pair.context) for pair in pairs]
    yield _control("first half of the query", [ask for ask in halves if ask[0] not in ("", *queries)], codec, recall)
    yield _control("queries of unseen pages", [(pair.query, pair.context) for pair in unseen], codec, recall)


def _control(
    name: str,
    asked: list[tuple[str, str]],
    codec: TextCodec,
    recall: Callable[..., Any],
    queries: int = _CONTROL_QUERIES,
) -> dict[str, Any]:
    """Ask for some `(query, context)` greedily: how often the context comes back, how near, and how often nothing."""
    # An answer that never ends is read as far as the longest context of its batch goes. Sort, so that few are long.
    sample = random.Random(0).sample(asked, min(queries, len(asked)))
    sample.sort(key=lambda ask: len(codec.ids(ask[1])))
    found: list[str] = []
    for start in range(0, len(sample), 16):
        prompts, contexts = zip(*sample[start : start + 16], strict=True)
        found += recall(prompts, max_new_tokens=len(codec.ids(contexts[-1])) + 16)
    near = [
        difflib.SequenceMatcher(None, text.split(), context.split(), autojunk=False).ratio()
        for text, (_, context) in zip(found, sample, strict=True)
    ]
    return {
        "control": name,
        "queries": len(sample),
        "exact": sum(text == context for text, (_, context) in zip(found, sample, strict=True)),
        "empty": sum(not text for text in found),
        "similar_0.5": sum(ratio >= 0.5 for ratio in near),
        "similar_0.9": sum(ratio >= 0.9 for ratio in near),
    }


def _read_forward(pipeline: R3MemPipeline, queries: Sequence[str], max_new_tokens: int) -> Any:
    """Continue the same prompts greedily in the forward direction, which is the backward one with a single layer."""
    config = pipeline.model.r3mem_config
    pipeline.model.r3mem_config = dataclasses.replace(config, core=(0, 1))
    try:
        return pipeline.recall(queries, max_new_tokens=max_new_tokens)
    finally:
        pipeline.model.r3mem_config = config


def _swapped(pair: Pair, pairs: Sequence[Pair]) -> str | None:
    """Replace the query's entities by other pages'; None if it mentions none, or the others are too few."""
    found = mentioned(pair.entities, pair.query)
    others = {name for other in pairs if other.document != pair.document for name in other.entities}
    names = sorted(others - set(pair.entities))
    if not found or len(names) < len(found):
        return None
    return swap_entities(pair.query, pair.entities, random.Random(pair.query).sample(names, len(found)))


def _compress_loss(pipeline: R3MemPipeline, pairs: Sequence[Pair]) -> float:
    """Return the nats a token of the queries given their contexts, read forward."""
    losses = []
    for pair in pairs:
        batch = PairCollator(pipeline.tokenizer)([pair])
        with torch.no_grad():
            losses.append(pipeline.model(**batch, terms=["compress"]).compress_loss.item())
    return round(statistics.fmean(losses), 4)


if __name__ == "__main__":
    raise SystemExit(main())
