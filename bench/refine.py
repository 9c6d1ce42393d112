"""What tuning a memory to its own text buys, by the number of steps: on answers, and on the text that follows.

    python -m bench.refine --json --data FOLDER --kind xquad --steps 5 20 80
    python -m bench.refine --json --data FOLDER --kind novels --slots 64 16 --steps 5 20 80

Matched memories, and with --adapter anchored ones, are refined to their own text: of paragraphs in a share of their
tokens (kind xquad, asked as in `bench.memory_answers`), or of segments of 256 tokens (other kinds, read on as in
`bench.matched`):

    ARM+N            in N steps, as `R3MemPipeline.refine` does: half by what asks for pieces of the text (the piece
                     itself, the queries of its hierarchy), half by how the model goes on behind the text
    ARM+N asked      by what asks alone
    ARM+N text       by the pieces alone
    ARM+N continued  by how the model goes on alone
    ARM+N other      by what asks for another text: a control, for what would be learned from any text

Measured are shares of what the whole text gains over nothing, and by how many nats refined memories are better, with
bootstrapped intervals of 95 % over texts, and seconds: of a step, and of compressing. With --output, the same command
goes on where it was interrupted.
"""

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from r3mem_fast import Memory, R3MemConfig, R3MemModel, RefineSettings, load_model
from r3mem_fast.codec import TextCodec
from r3mem_fast.data.text import opening_ids
from r3mem_fast.questions import AskingTexts
from r3mem_fast.training.refine import refine

from .anchored import anchored_memory, load_adapter
from .answers_data import chosen_groups, read_xquad
from .memory_answers import gains, graded, memories_of
from .places import begun, interval, places_of
from .presses import add_allocation_option
from .prompts import KINDS, prompt_of
from .records import run
from .rivals import laid_out
from .texts import KINDS as TEXTS
from .texts import texts_of
from .unfinished import Unfinished, settings_of

ASKED = ("both", "asked", "text", "continued", "other")
_LENGTH, _TAIL = 256, 32


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.refine", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="(%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="(%(default)s)")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets, see bench/texts.py")
    parser.add_argument("--kind", choices=["xquad", *TEXTS], default="xquad", help="(%(default)s)")
    parser.add_argument("--questions", type=int, default=80, help="about paragraphs, at most (%(default)s)")
    parser.add_argument("--segments", type=int, default=32, help="of texts, at most (%(default)s)")
    parser.add_argument("--slots", type=int, nargs="+", default=[64, 16], help="of a segment (%(default)s)")
    parser.add_argument("--ratio", type=int, default=4, help="tokens of a paragraph's slot (%(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 20, 80], help="(%(default)s)")
    parser.add_argument("--asked", choices=ASKED, nargs="+", default=["both"], help="see above (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=RefineSettings().learning_rate, help="(%(default)s)")
    add_allocation_option(parser)
    parser.add_argument("--adapter", help="folder of an adapter of anchors, whose memories are refined, too")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of texts (%(default)s)")
    return run(parser, _records, arguments)


def _records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    base, tokenizer = load_model(options.model, dtype=options.dtype)
    model = R3MemModel(base, _config(max(options.slots), options.allocation)).eval()
    learned = load_adapter(options.adapter, model, anchored=True) if options.adapter else None
    yield {
        "kind": options.kind, "model": Path(options.model).name, "dtype": options.dtype, "steps": options.steps,
        "allocation": options.allocation, "ratio": options.ratio,
        "learning_rate": options.learning_rate, "asked_tokens": RefineSettings().asked_tokens,
        "continued_share": RefineSettings().continued_share,
        "threads": torch.get_num_threads(), "adapter": options.adapter and Path(options.adapter).name,
    }  # fmt: skip
    run = _on_answers if options.kind == "xquad" else _on_what_follows
    timed = _Timed(options, AskingTexts(TextCodec(tokenizer)))
    unfinished = Unfinished(options.output, settings_of(options), batch=1, progress=not options.json)
    yield from run(options, model, learned, tokenizer, timed, unfinished)
    unfinished.remove()
    for what, seconds in timed.seconds.items():
        yield {"seconds_of": what, "mean": round(sum(seconds) / len(seconds), 3), "count": len(seconds)}


def _config(slots: int, allocation: str) -> R3MemConfig:
    return R3MemConfig(
        memory_writer="matched", adapter_rows="memory", num_memory_tokens=slots, memory_budget=slots,
        segment_length=_LENGTH, segment_overlap=_TAIL, memory_allocation=allocation,
    )  # fmt: skip


class _Timed:
    """Refines memories, and notes how long it takes.

    Args:
        options: The command's arguments.
        asking: Writes what asks for a piece of a text.

    Attributes:
        seconds: Seconds of a step, and of what else was timed, by name.
    """

    def __init__(self, options: argparse.Namespace, asking: AskingTexts):
        self._options, self._asking = options, asking
        self.seconds: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def timed(self, what: str, count: int = 1) -> Iterator[None]:
        """Note the seconds of what is done in the block, of each of `count` times: a context manager."""
        started = time.perf_counter()
        yield
        self.seconds.setdefault(what, []).append((time.perf_counter() - started) / count)

    def refined(
        self, model: R3MemModel, arm: str, memory: Memory, ids: torch.Tensor, other: torch.Tensor
    ) -> Iterator[tuple[str, Memory]]:
        """Refine a memory of one row in all ways that are asked for: the arm's name, and the memory.

        Args:
            model: The model that reads it.
            arm: Name of the memory.
            memory: The memory.
            ids: Token ids that it was made of, int64 `[T]`.
            other: Token ids of another text.
        """
        share = {"both": RefineSettings().continued_share, "continued": 1.0}
        by: dict[str, Callable] = {
            "text": lambda piece: self._asking(piece)[:1],
            "other": lambda piece: self._asking(other),
        }
        for asked in self._options.asked:
            asked_of = by.get(asked, self._asking)
            for steps in self._options.steps:
                settings = RefineSettings(
                    steps=steps,
                    learning_rate=self._options.learning_rate,
                    continued_share=share.get(asked, 0.0),
                )
                asked_of(ids)  # which pipelines do once
                with self.timed("step", steps):
                    report = refine(model, memory, [ids], asked_of, settings, progress=False)
                yield f"{arm}+{steps}{'' if asked == 'both' else f' {asked}'}", report.memory


def _on_answers(options, model, learned, tokenizer, timed, unfinished):
    """Ask about paragraphs behind refined memories of them."""
    kind = KINDS["xquad"]
    options.instruction, options.opener, options.new_tokens = kind.instruction, kind.opener, kind.new_tokens
    options.ratios, options.presses, options.queries, options.batch = [options.ratio], [], [], 32
    options.adaptive = options.allocation == "adaptive"
    closed = "adaptive" if options.adaptive else "matched"
    groups = chosen_groups(read_xquad(options.data), options.questions, options.seed)
    prompts = [prompt_of(options, tokenizer, group) for group in groups]

    def measured(index: int) -> dict[str, dict]:
        prompt, other = prompts[index], prompts[(index + len(prompts) // 2) % len(prompts)].context[0]
        memories = memories_of(options, model, learned, prompt)
        ids = torch.cat([prompt.before, prompt.context], 1)[0]
        with laid_out(model, memories["full"].layout):
            for arm in (closed, "anchored")[: 1 if learned is None else 2]:
                refined = timed.refined(model, arm, memories[f"{arm}_{options.ratio}"], ids, other)
                memories |= {name: dataclasses.replace(memory, refined=None) for name, memory in refined}
        return graded(options, model, tokenizer, prompt, memories)

    found = unfinished.each("paragraphs", range(len(prompts)), measured, "Refining")
    sums, counts = yield from gains(prompts, found)
    nats = {arm: values for (arm, measure), values in sums.items() if measure == "nats"}
    yield from _better(nats, counts, lambda arm: f"{arm}_{options.ratio}")


def _on_what_follows(options, model, learned, tokenizer, timed, unfinished):
    """Read on behind refined memories of segments."""
    opening, texts = opening_ids(tokenizer), texts_of(options.kind, options.data)
    places = places_of(texts, tokenizer, _LENGTH, held_out=0.5, count=options.segments, before=1)

    def measured(index: int) -> dict[str, float]:
        segments, other = places[index].segments, places[(index + len(places) // 2) % len(places)].segments[0]
        before, segment = begun(opening, segments[:1], replace=True), segments[1:]
        losses = {}
        for arm, memory in _memories(options, model, learned, tokenizer, timed, before, other):
            with torch.no_grad(), laid_out(model, memory.layout):
                losses[arm] = _nats(model(segment, memory=memory).logits, segment)
        for arm, ids in (("full", before), ("tail", begun(opening, before[:, -_TAIL:]))):
            with torch.no_grad(), model.disable_adapters():
                logits = model.plain_model(torch.cat([ids, segment], 1), use_cache=False).logits
            losses[arm] = _nats(logits[:, -_LENGTH:], segment)
        return losses

    losses = unfinished.each("segments", range(len(places)), measured, "Refining")
    yield {"segments": len(places)}
    found = {arm: torch.tensor([one[arm] for one in losses]) for arm in losses[0]}
    for arm, values in found.items():
        yield {"arm": arm, "nats_per_token": round(values.mean().item(), 4)}
        if arm not in ("full", "tail"):
            yield {"closed_by": arm, **interval(found["tail"] - values, found["tail"] - found["full"])}
    yield from _better(found, torch.ones(len(places)), lambda arm: arm)


def _better(
    nats: dict[str, torch.Tensor], counts: torch.Tensor, unrefined: Callable[[str], str]
) -> Iterator[dict[str, Any]]:
    """By how many nats refined memories are better than the same as they were, and than those asked for another text.

    Args:
        nats: Sums of each text, `[texts]`, by arm.
        counts: What they are sums over, `[texts]`.
        unrefined: Gives the arm of memories as they were, for what stands before the "+" of a refined one's.
    """
    for arm, values in nats.items():
        way, _, asked = arm.partition(" ")
        if "+" in arm and asked != "other":
            for rival in (unrefined(arm.partition("+")[0]), f"{way} other"):
                if rival in nats:
                    yield {"arm": arm, "nats_better_than": rival, **interval(nats[rival] - values, counts)}


def _memories(options, model, learned, tokenizer, timed, before, other):
    """Memories of a segment, by arm, and refined ones."""
    pinned = len(opening_ids(tokenizer))
    for slots in options.slots:
        layout = _config(slots, options.allocation).memory_layout(model.max_tokens)
        with laid_out(model, layout):
            with timed.timed("compressing"):
                memory = model.compress(before, pinned=pinned)
            kinds = {f"{'adaptive' if layout.is_adaptive else 'matched'}_{slots}": memory}
            if learned is not None:
                kinds[f"anchored_{slots}"] = anchored_memory(
                    learned, before, model.empty_memory(pinned=pinned), layout
                )
            for arm, memory in kinds.items():
                yield arm, memory
                yield from timed.refined(model, arm, memory, before[0], other)


def _nats(logits: torch.Tensor, segment: torch.Tensor) -> float:
    return cross_entropy(logits[0, :-1].float(), segment[0, 1:]).item()


if __name__ == "__main__":
    raise SystemExit(main())
