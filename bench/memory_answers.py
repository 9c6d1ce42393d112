"""Questions about a text, answered behind a memory of it and behind rivals of as many slots; no training.

    python -m bench.memory_answers --json --data ../shared/data --kind xquad --ratios 4 8 16 --questions 320

A prompt is what the chat template puts before a user's words, the text, the question, and what the template puts after
it. All arms have the template's tokens and the question as they are. Of n tokens of text they have

    full        all
    nothing     none
    raw_R       the last n/R (rounded up), as they are, and never read the others
    even_R      n/R slots: evenly spaced keys, with their values
    attended_R  n/R slots: the keys that are attended most, with their values
    matched_R   n/R slots: the same keys, with values that match the attention to all of them
    matched_R by Q   the same, matched to other queries (`memory_queries`), which choose the keys, too
    snapkv_R …  n/R slots: the keys that a press of kvpress chooses, with their values (where kvpress is installed)
    adaptive_R  n/R slots of a head on average, which heads share, with values that match (with --adaptive); also
                attended_adaptive_R, and snapkv_adaptive_R …, with the keys' own values
    anchored_R  n/R slots: the matched memory with the change that an adapter of anchors has learned (with --adapter)

Answers are written greedily. `f1` and `contains` grade them by the references, `nats_per_answer_token` is how
surprising the first reference is. `gained` is the share of the difference between `nothing` and `full` that an arm
makes up for. Intervals of 95 % are bootstrapped over texts.

With --output, the same command goes on where it was interrupted.

Every arm is a key-value cache behind which the same questions are read, in the same batches. A memory of all slots is
the text itself, key by key, so that `full`, `nothing` and `raw` are caches of the base model's own states.
"""

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from r3mem_fast import Memory, R3MemConfig, R3MemModel, load_model
from r3mem_fast.choices import QUERIES
from r3mem_fast.codec import TextCodec
from r3mem_fast.memory import MemoryLayout
from r3mem_fast.questions import SegmentQuestions

from .anchored import anchored_memory, load_adapter
from .answers_data import Question, chosen_groups, contains, f1, read_pairs, read_qmsum, read_xquad
from .asking import answered
from .places import interval
from .presses import PRESSES, add_presses_option, keep_best, keep_shared, press_scores
from .prompts import KINDS, Prompt, ids_of, prompt_of
from .records import add_output_option, add_records
from .rivals import evenly_spaced, laid_out, values_kept
from .unfinished import Unfinished, settings_of

_MEASURES = ("f1", "contains", "nats")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory_answers", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="(%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="(%(default)s)")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets, see bench/answers_data.py")
    parser.add_argument("--kind", choices=list(KINDS), default="xquad", help="data set (%(default)s)")
    parser.add_argument("--ratios", type=int, nargs="+", default=[4, 8, 16], help="tokens of a slot (%(default)s)")
    parser.add_argument("--questions", type=int, default=320, help="that are asked, at most (%(default)s)")
    parser.add_argument("--pairs", type=int, nargs="+", default=[4, 8, 16], help="of a text of pairs (%(default)s)")
    parser.add_argument("--characters", type=int, default=8, help="of a key or a value, of 36 (%(default)s)")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a meeting, at most (%(default)s)")
    parser.add_argument("--adaptive", action="store_true", help="also memories whose heads share their slots")
    parser.add_argument("--queries", nargs="*", choices=QUERIES, default=[], help="to match to, beside own")
    parser.add_argument("--adapter", help="folder of an adapter of anchors, whose memories are a rival")
    parser.add_argument("--instruction", help="before each question (one that fits the kind)")
    parser.add_argument("--opener", help="of each answer (one that fits the kind)")
    add_presses_option(parser)
    parser.add_argument("--new-tokens", type=int, help="of an answer, at most (24; meetings: 64; pairs: 48)")
    parser.add_argument("--batch", type=int, default=32, help="answers written at one time (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of texts (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    kind = KINDS[options.kind]
    options.instruction = kind.instruction if options.instruction is None else options.instruction
    options.opener = kind.opener if options.opener is None else options.opener
    options.new_tokens = options.new_tokens or kind.new_tokens
    add_records(_records(options), options)
    return 0


def _records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    base, tokenizer = load_model(options.model, dtype=options.dtype)
    model = R3MemModel(base).eval()
    model.questions_of = SegmentQuestions(TextCodec(tokenizer))
    learned = load_adapter(options.adapter, model, anchored=True) if options.adapter else None
    yield {
        "kind": options.kind, "model": options.model, "dtype": options.dtype, "ratios": options.ratios,
        "instruction": options.instruction, "opener": options.opener, "new_tokens": options.new_tokens,
        "presses": options.presses, "adapter": options.adapter and Path(options.adapter).name,
        "adaptive": options.adaptive,
    }  # fmt: skip
    unfinished = Unfinished(options.output, settings_of(options), batch=options.batch, progress=not options.json)

    def asked(stage: str, questions: list[Question]) -> Iterator[dict[str, Any]]:
        """Ask some of the questions, and say how each arm answered."""
        groups = chosen_groups(questions, options.questions, options.seed)
        prompts = [prompt_of(options, tokenizer, group) for group in groups]

        def answered(prompt: Prompt) -> dict[str, dict]:
            return graded(options, model, tokenizer, prompt, memories_of(options, model, learned, prompt))

        return _records_of(options, prompts, unfinished.each(stage, prompts, answered, "Asking"))

    if options.kind == "pairs":
        for pairs in options.pairs:
            questions = read_pairs(options.data, pairs, options.seed, options.characters)
            for record in asked(f"{pairs} pairs", questions):
                yield {"pairs": pairs, **record}
    elif options.kind == "xquad":
        yield from asked("texts", read_xquad(options.data))
    else:
        questions = read_qmsum(options.data, lambda text: len(ids_of(tokenizer, text)), options.context)
        yield from asked("texts", questions)
    unfinished.remove()


def _records_of(
    options: argparse.Namespace, prompts: list[Prompt], found: list[dict[str, dict]]
) -> Iterator[dict[str, Any]]:
    """Say how each arm answered, and by how much ours are better than their rivals."""
    sums, counts = yield from gains(prompts, found)
    presses = options.presses
    rivals = {
        "matched": ("raw", "even", "attended", *presses),
        "adaptive": ("matched", "raw", "attended_adaptive", *(f"{press}_adaptive" for press in presses)),
        "anchored": ("matched", "adaptive", "raw"),
    }
    for ratio in options.ratios:
        arms = {arm for arm, _ in sums}
        for mine, its in rivals.items():
            about = {} if mine == "matched" else {"arm": f"{mine}_{ratio}"}
            for rival in its:
                if not {f"{mine}_{ratio}", f"{rival}_{ratio}"} <= arms:
                    continue
                for name in _MEASURES:
                    better = sums[f"{mine}_{ratio}", name] - sums[f"{rival}_{ratio}", name]
                    better = -better if name == "nats" else better
                    yield {**about, f"{name}_better_than": rival, "ratio": ratio, **_interval(better, counts)}


def gains(
    prompts: list[Prompt], found: list[dict[str, dict]]
) -> Generator[dict[str, Any], None, tuple[dict[tuple[str, str], torch.Tensor], torch.Tensor]]:
    """Say how well each arm answered, and what share that is of what the whole texts gain over nothing.

    Args:
        prompts: Questions about each text.
        found: What `graded` found of each text.

    Yields:
        Records.

    Returns:
        Sums over the questions of each text, by arm and measure, and the number of these questions, `[texts]`.
    """
    sums = {
        (arm, name): torch.tensor([float(sum(grades[arm][name])) for grades in found])
        for arm in found[0]
        for name in _MEASURES
    }
    counts = torch.tensor([float(len(prompt.questions)) for prompt in prompts])
    lengths = [prompt.context.shape[1] for prompt in prompts]
    yield {"questions": int(counts.sum()), "contexts": len(prompts), "context_tokens": sum(lengths) / len(lengths)}
    means = {key: (values.sum() / counts.sum()).item() for key, values in sums.items()}
    for arm in found[0]:
        yield {
            "arm": arm,
            **{name: round(means[arm, name], 4) for name in ("f1", "contains")},
            "nats_per_answer_token": round(means[arm, "nats"], 4),
        }
    for name in _MEASURES:
        wanted = sums["full", name] - sums["nothing", name]
        for arm in found[0]:
            if arm not in ("full", "nothing"):
                gained = sums[arm, name] - sums["nothing", name]
                yield {"gained_by": arm, "of": name, **_interval(gained, wanted)}
    return sums, counts


def _interval(won: torch.Tensor, wanted: torch.Tensor) -> dict[str, float | None]:
    """An interval of a share; what would be a share of nothing is None."""
    found = interval(won, wanted)
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


@torch.no_grad()
def graded(
    options: argparse.Namespace, model: R3MemModel, tokenizer: Any, prompt: Prompt, memories: dict[str, Memory]
) -> dict[str, dict]:
    """Answer the questions about one text: by arm and measure, the grades of each.

    Args:
        options: The command's arguments.
        model: The model.
        tokenizer: Its tokenizer.
        prompt: The questions.
        memories: Memories of the text by arm, `full` among them, in its layout.
    """
    count = len(prompt.questions)
    arms = sorted(memories, key=lambda arm: memories[arm].states.shape[4])  # rows of one batch are about as wide
    size = max(1, options.batch // count)
    until = '"' if options.opener.endswith('"') else None
    grades: dict[str, dict] = {}
    with laid_out(model, memories["full"].layout):
        for start in range(0, len(arms), size):
            some = arms[start : start + size]
            memory = Memory.cat([memories[arm] for arm in some])
            memory = memory.rows([row for row in range(len(some)) for _ in range(count)])
            asked, answers = prompt.asked * len(some), prompt.answers * len(some)
            nats, texts = answered(model, tokenizer, memory, asked, answers, options.new_tokens, until)
            for index, arm in enumerate(some):
                here = slice(index * count, (index + 1) * count)
                replies = list(zip(texts[here], prompt.questions, strict=True))
                grades[arm] = {
                    "f1": [f1(text, question.answers) for text, question in replies],
                    "contains": [contains(text, question.answers) for text, question in replies],
                    "nats": nats[here],
                }
    return {arm: grades[arm] for arm in memories}


def memories_of(
    options: argparse.Namespace, model: R3MemModel, learned: R3MemModel | None, prompt: Prompt
) -> dict[str, Memory]:
    """Make memories of a text by arm, of one row each and in one layout: that of a memory of the whole text."""
    prefix, tokens = prompt.before.shape[1], prompt.context.shape[1]
    whole = _layout(model, prefix + tokens, prefix + tokens)
    shared = learned is not None and learned.r3mem_config.memory_allocation == "adaptive"
    if options.adaptive or shared:  # as memories of one batch must have one layout
        whole = dataclasses.replace(whole, allocation="adaptive")
    with laid_out(model, whole):
        origin = model.origin()
        nothing = model.compress(prompt.before, pinned=prefix, finish=True) if prefix else model.empty_memory()
        found = {"full": model.compress(prompt.context, memory=nothing, finish=True), "nothing": nothing}
        for ratio in options.ratios:
            last = prompt.context[:, tokens - math.ceil(tokens / ratio) :]
            found[f"raw_{ratio}"] = model.compress(last, memory=nothing, finish=True)
    kinds: dict[str, Callable] = {
        "matched": contextlib.nullcontext, "attended": values_kept, "even": evenly_spaced,
    }  # fmt: skip
    for ratio in options.ratios:
        layout = _layout(model, tokens, math.ceil(tokens / ratio), KINDS[options.kind].segment)
        for kind, choice in kinds.items():
            # Layouts differ in numbers of slots alone, which matter while a memory is made.
            with choice(), laid_out(model, layout):
                start = dataclasses.replace(nothing, layout=layout, origin=model.origin())
                memory = model.compress(prompt.context, memory=start, finish=True)
            found[f"{kind}_{ratio}"] = dataclasses.replace(memory, layout=whole, origin=origin)
        others = {f"matched_{ratio} by {queries}": {"queries": queries} for queries in options.queries}
        if options.adaptive:
            others |= {f"{kind}adaptive_{ratio}": {"allocation": "adaptive"} for kind in ("", "attended_")}
        for arm, change in others.items():
            changed = dataclasses.replace(layout, **change)
            choice = values_kept if arm.startswith("attended") else contextlib.nullcontext
            with choice(), laid_out(model, changed):
                start = dataclasses.replace(nothing, layout=changed, origin=model.origin())
                memory = model.compress(prompt.context, memory=start, finish=True)
            found[arm] = dataclasses.replace(memory, layout=whole, origin=origin)
        if learned is not None:
            allocated = dataclasses.replace(layout, allocation=learned.r3mem_config.memory_allocation)
            memory = anchored_memory(learned, prompt.context, nothing, allocated)
            found[f"anchored_{ratio}"] = dataclasses.replace(memory, layout=whole, origin=origin)
    ids, repeat = torch.cat([prompt.before, prompt.context], 1), torch.tensor(prompt.repeat)
    scores: dict[str, torch.Tensor] = {}  # by the settings of a press: most are the same for all numbers of slots
    for ratio in options.ratios:
        slots = math.ceil(tokens / ratio)
        for name in options.presses:
            press = PRESSES[name](slots)
            settings = repr(press)
            if settings not in scores:
                with model.disable_adapters():
                    scores[settings] = press_scores(model.plain_model, press, ids, prefix=prefix, repeat_ids=repeat)
            found[f"{name}_{ratio}"] = keep_best(found["full"], scores[settings], prefix + slots)
            if options.adaptive:
                found[f"{name}_adaptive_{ratio}"] = keep_shared(found["full"], scores[settings], slots)
    return found


def _layout(model: R3MemModel, tokens: int, slots: int, segment: int | None = None) -> MemoryLayout:
    """Layout of a memory of so many tokens.

    Args:
        model: The model.
        tokens: Tokens of a text.
        slots: Slots of it, beside those that are pinned. If there are as many as tokens, nothing is left out.
        segment: Tokens that are read at once; None: all, if something is to be matched.
    """
    if slots == tokens:
        # No more than about a thousand slots can be matched at a time, and here nothing is.
        segment = 256
    length = min(segment or tokens, tokens)
    config = R3MemConfig(
        memory_writer="matched", num_memory_tokens=min(slots, math.ceil(length * slots / tokens)), memory_budget=slots,
        segment_length=length, segment_overlap=0, beyond_budget="forget" if slots == tokens else "rematch",
    )  # fmt: skip
    layout = config.memory_layout(model.max_tokens)
    assert layout is not None
    return layout


if __name__ == "__main__":
    raise SystemExit(main())
