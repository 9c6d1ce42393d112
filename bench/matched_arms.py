"""Reads segments behind the memories of `bench.matched` and their rivals, and says how well."""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from r3mem_fast import Memory, R3MemConfig, R3MemModel
from r3mem_fast.data.text import opening_ids
from r3mem_fast.memory import MemoryLayout
from r3mem_fast.memory.segments import advance, cut_segments
from r3mem_fast.memory.writers.matched import MatchedWriter, Pass

from .anchored import anchored_memory
from .places import CHAIN, Place, begun
from .presses import PRESSES, REPEAT, keep_best, press_scores
from .rivals import evenly_spaced, laid_out, values_kept
from .unfinished import Losses


class Arms:
    """Reads segments behind every arm: the losses that it returns are nats a token by arm, `[segments]` each.

    Args:
        options: The command's arguments.
        model: The model that reads, without an adapter.
        learned: The model with the adapter that is a rival, or None.
        tokenizer: Their tokenizer.
    """

    def __init__(self, options: argparse.Namespace, model: R3MemModel, learned: R3MemModel | None, tokenizer: Any):
        self._options, self._model, self._learned = options, model, learned
        self._opening = opening_ids(tokenizer)
        self._repeat = torch.tensor(tokenizer(f"{REPEAT}\n", add_special_tokens=False).input_ids)

    @torch.no_grad()
    def behind_one(self, places: list[Place], foreign: list[Place]) -> Losses:
        """Read segments behind the segment before each.

        Args:
            places: The segments.
            foreign: As many of other texts, whose memories are a control.
        """
        options = self._options
        context, others = (torch.stack([place.segments for place in some]) for some in (places, foreign))
        segment, tail = context[:, -1], context[:, -2, -options.tail :]
        before, other = (begun(self._opening, rows[:, -2], replace=True) for rows in (context, others))
        raw = {"tail": begun(self._opening, tail), "full": before}
        if options.foreign:
            raw["foreign"] = torch.cat([other, tail], 1)
        if "raw" in options.rivals:
            raw |= {f"raw_{n}": begun(self._opening, context[:, -2, -options.tail - n :]) for n in options.slots}
        arms = {arm: self._raw_loss(ids, segment) for arm, ids in raw.items()}
        for arm, memory in self._memories(before):
            arms[arm] = self._loss_behind(memory, segment)
        for slots in options.foreign:
            for kind in ("", "adaptive_") if options.adaptive else ("",):
                memory = self._matched(other, slots, slots, "adaptive" if kind else "uniform")
                arms[f"foreign_{kind}{slots}"] = self._loss_behind(memory, segment, tail)
        learned = self._learned
        if learned is not None and learned.is_anchored:
            wanted = [(f"anchored_{slots}", before, slots) for slots in options.slots]
            wanted += [(f"foreign_anchored_{slots}", other, slots) for slots in options.foreign]
            for arm, rows, slots in wanted:
                arms[arm] = self._loss_behind(self._anchored(learned, rows, slots, slots), segment, tail)
        elif learned is not None:
            # Compute as in training, where adapters ran in bfloat16, too.
            with torch.autocast("cpu", torch.bfloat16, enabled=learned.peft_model.dtype == torch.bfloat16):
                memory = dataclasses.replace(learned.compress(context[:, -2], finish=True), recent=tuple(tail))
                logits = learned(segment, memory=memory).logits
                arms[f"learned_{learned.r3mem_config.num_memory_tokens}"] = mean_loss(logits, segment)
                logits = learned(torch.cat([tail, segment], 1), logits_to_keep=options.length).logits
                arms["learned_tail"] = mean_loss(logits, segment)
        return arms

    @torch.no_grad()
    def behind_many(self, places: list[Place], lengths: Sequence[int], foreign: list[Place] | None = None) -> Losses:
        """Read segments behind so many segments before each.

        Args:
            places: The segments.
            lengths: Numbers of segments.
            foreign: As many of other texts: memories of the seven segments before those are a control.
        """
        options, budget = self._options, self._options.budget
        context = torch.stack([place.segments for place in places])
        segment = context[:, -1]
        seven = context[:, -1 - CHAIN : -1].flatten(1)
        tail = seven[:, -options.tail :]
        raw = {
            "tail": begun(self._opening, tail),
            "full_of_7": begun(self._opening, seven, replace=True),
            f"raw_{budget}_of_7": begun(self._opening, seven[:, -options.tail - budget :]),
        }
        arms = {arm: self._raw_loss(ids, segment) for arm, ids in raw.items()}
        kinds = ["matched", *["adaptive"] * options.adaptive]
        kinds += ["anchored"] * (self._learned is not None and self._learned.is_anchored)
        wanted = [(f"{kind}_{budget}_of_{count}", kind, context, count) for count in lengths for kind in kinds]
        if options.foreign and foreign is not None:
            others = torch.stack([place.segments for place in foreign])
            wanted += [(f"foreign_{kind}_{budget}_of_7", kind, others, CHAIN) for kind in kinds]
        for arm, kind, rows, count in wanted:
            before = begun(self._opening, rows[:, -1 - count : -1].flatten(1), replace=True)
            slots = options.chain_slots or max(options.slots)
            if kind == "anchored":
                memory = self._anchored(self._learned, before, slots, budget)
            else:
                memory = self._matched(before, slots, budget, "adaptive" if kind == "adaptive" else "uniform")
            arms[arm] = self._loss_behind(memory, segment, tail)
        return arms

    def _memories(self, before: torch.Tensor) -> Iterator[tuple[str, Memory]]:
        """Memories of segments, by arm, all of the same pass over them but those of another pass's queries."""
        options, model = self._options, self._model
        rows, pinned = list(before), len(self._opening)
        with model.disable_adapters(), laid_out(model, self._layout(options.length, options.length)):
            none = model.new_memory(len(rows), origin=None, pinned=pinned)
            segments = cut_segments(none, rows, finish=True, writes_all=True)
            found = self._writer().pass_over(segments[0], none)
            whole = self._written(found)
        carried = advance(none, rows, segments)
        kinds = {"matched": contextlib.nullcontext, "attended": values_kept, "even": evenly_spaced}
        kinds = {kind: choice for kind, choice in kinds.items() if kind in ("matched", *options.rivals)}
        for slots in options.slots:
            layout = self._layout(slots, slots)
            for kind, choice in kinds.items():
                with model.disable_adapters(), choice(), laid_out(model, layout):
                    yield f"{kind}_{slots}", dataclasses.replace(self._written(found), **carried)
            if options.adaptive:
                sharing = self._layout(slots, slots, "adaptive")
                for kind, choice in (("adaptive", contextlib.nullcontext), ("attended_adaptive", values_kept)):
                    with model.disable_adapters(), choice(), laid_out(model, sharing):
                        memory = dataclasses.replace(self._written(found), layout=sharing, **carried)
                    yield f"{kind}_{slots}", memory
            for queries in options.queries:
                asking = dataclasses.replace(layout, queries=queries)
                with model.disable_adapters(), laid_out(model, asking):
                    memory = self._written(found)
                    yield f"matched_{slots} by {queries}", dataclasses.replace(memory, **carried)
        for name in options.presses:
            with model.disable_adapters():
                press = PRESSES[name](2 * options.tail)
                scores = press_scores(model.plain_model, press, before, prefix=pinned, repeat_ids=self._repeat)
            for slots in options.slots:
                memory = keep_best(whole, scores[..., : -options.tail], pinned + slots)
                yield f"{name}_{slots}", dataclasses.replace(memory, **carried)

    def _raw_loss(self, before: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
        """Nats a token of segments behind raw tokens, by row."""
        model = self._model
        with model.disable_adapters():
            ids = torch.cat([before, segment], 1)
            logits = model.plain_model(ids, logits_to_keep=segment.shape[1], use_cache=False).logits
        return mean_loss(logits, segment)

    def _writer(self) -> MatchedWriter:
        model = self._model
        return MatchedWriter(model.reader, model.reader.layout, model.questions_of)

    def _written(self, found: Pass) -> Memory:
        """Match what a pass has read, and warn if something could not be matched."""
        writer = self._writer()
        memory = writer.written(found)
        writer.finish()
        return memory

    def _matched(self, before: torch.Tensor, slots: int, budget: int, allocation: str) -> Memory:
        """Matched memories of what is before segments, int64 `[B, T]`."""
        with laid_out(self._model, self._layout(slots, budget, allocation)):
            return self._model.compress(before, finish=True, pinned=len(self._opening))

    def _anchored(self, learned: R3MemModel, before: torch.Tensor, slots: int, budget: int) -> Memory:
        """Memories as `_matched` makes them, with what an adapter of anchors has learned."""
        nothing = learned.empty_memory(len(before), pinned=len(self._opening))
        layout = self._layout(slots, budget, learned.r3mem_config.memory_allocation)
        return anchored_memory(learned, before, nothing, layout)

    def _loss_behind(self, memory: Memory, segment: torch.Tensor, tail: torch.Tensor | None = None) -> torch.Tensor:
        """Nats a token of segments behind memories, and the last tokens before them, by row.

        Args:
            memory: The memories.
            segment: Token ids, int64 `[B, T]`.
            tail: The last tokens, int64 `[B, tail]`, in place of those that a memory holds.
        """
        model = self._model
        # Layouts differ in numbers of slots, which only matter while a memory is made.
        layout = self._layout(self._options.length, self._options.length, memory.layout.allocation)
        with laid_out(model, layout):
            memory = dataclasses.replace(memory, layout=model.layout, origin=model.origin())
            if tail is not None:
                memory = dataclasses.replace(memory, recent=tuple(tail))
            return mean_loss(model(segment, memory=memory).logits, segment)

    def _layout(self, slots: int, budget: int, allocation: str = "uniform") -> MemoryLayout:
        """Layout of matched memories with so many slots a segment, and in all."""
        options = self._options
        config = R3MemConfig(
            memory_writer="matched", num_memory_tokens=slots, memory_budget=budget, segment_length=options.length,
            segment_overlap=options.tail, beyond_budget=options.beyond, memory_allocation=allocation,
        )  # fmt: skip
        layout = config.memory_layout(self._model.max_tokens)
        assert layout is not None
        return layout


def mean_loss(logits: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """Nats a token of segments, by row, their first tokens not counted.

    Args:
        logits: `[B, T, vocabulary]`.
        segment: Token ids, int64 `[B, T]`.
    """
    # By row, because a batch's logits take gigabytes in float32 where the vocabulary is large.
    rows = zip(logits, segment, strict=True)
    return torch.stack([cross_entropy(row[:-1].float(), ids[1:], reduction="none") for row, ids in rows]).mean(1)
