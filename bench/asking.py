"""Asks questions behind memories and raw passages, in one batch of ways, and grades the answers without a judge."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from r3mem_fast import Memory, R3MemModel, R3MemPipeline
from r3mem_fast.integrations.compat import cache_argument
from r3mem_fast.memory.slots import slots_a_head
from r3mem_fast.store.documents import rows_of_one

from .answers_data import contains, f1, normalised


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question as it is read in one way.

    Attributes:
        memory: Memory before it, of one row.
        ids: Token ids behind the memory: raw passages, the question, and what comes before the answer.
    """

    memory: Memory
    ids: list[int]

    @property
    def carried(self) -> list[int]:
        """Token ids that the memory carries as they are."""
        return torch.cat([self.memory.recent[0], self.memory.unfinished[0]]).tolist()

    @property
    def slots(self) -> int:
        """Slots and tokens before the answer, without the memory's pinned ones."""
        return slots_a_head(self.memory) + len(self.carried) + len(self.ids)


def add_grades(totals: dict[str, dict[str, float]], graded: Mapping[str, Mapping[str, float]]) -> None:
    """Add the grades of a question to those of others, by way and measure.

    Args:
        totals: Sums of the grades so far, which are changed.
        graded: The grades of the question.
    """
    for way, grades in graded.items():
        total = totals.setdefault(way, {})
        for name, value in grades.items():
            total[name] = total.get(name, 0.0) + value


def ask_in_each_way(
    pipeline: R3MemPipeline,
    ways: Mapping[str, Asked],
    references: Sequence[str],
    *,
    new_tokens: int = 0,
    until: str | None = None,
    most: int = 8,
) -> dict[str, dict[str, float]]:
    """Ask a question in each way: grades by way and measure, in the order of the ways.

    Args:
        pipeline: The pipeline.
        ways: The question by way.
        references: Right answers; nats a token are those of the first one.
        new_tokens: Tokens of an answer at most; 0: none is written, and nats are all.
        until: See `answered`.
        most: Ways that are read at one time.
    """
    found: dict[str, dict[str, float]] = {}
    answer = pipeline.codec.ids(references[0])
    for names in _batches(ways, most):
        memory = rows_of_one([ways[name].memory for name in names])
        rows = [[*ways[name].carried, *ways[name].ids] for name in names]
        answers = [answer] * len(names)
        nats, texts = answered(pipeline.model, pipeline.tokenizer, memory, rows, answers, new_tokens, until)
        for name, loss, text in zip(names, nats, texts, strict=True):
            found[name] = {"nats": loss} | (grades(text, references) if new_tokens else {})
    return {name: found[name] for name in ways}


@torch.no_grad()
def answered(
    model: R3MemModel,
    tokenizer: Any,
    memory: Memory,
    asked: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    new_tokens: int,
    until: str | None = None,
) -> tuple[list[float], list[str]]:
    """Read questions behind the rows of a memory, and answer them greedily.

    Args:
        model: The model; its base model reads.
        tokenizer: Its tokenizer.
        memory: Memory of B rows.
        asked: Token ids behind each row.
        answers: Token ids of an answer of each row.
        new_tokens: Tokens that are written at most.
        until: What an answer ends with, and is not part of it; None: only the end token.

    Returns:
        How surprising each answer is, in nats a token, and what is written in each row.
    """
    base = model.plain_model
    (ids, mask), (targets, counted) = _padded(asked, left=True), _padded(answers)
    written: list[list[int]] = [[] for _ in asked]
    with model.disable_adapters():
        cache = memory.to_cache(model)

        def read(tokens: torch.Tensor, mask: torch.Tensor, last: int) -> torch.Tensor:
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
            settings = {"logits_to_keep": last} if model.slices_logits else {}
            settings |= cache_argument(base, cache)
            found = base(tokens, attention_mask=mask, position_ids=positions, use_cache=True, **settings)
            return found.logits[:, -last:].float()

        predicted = first = read(ids, mask, 1)
        behind = targets.shape[1] - 1
        if behind:
            predicted = torch.cat([first, read(targets[:, :-1], torch.cat([mask, counted[:, :-1]], 1), behind)], 1)
        nats = cross_entropy(predicted.transpose(1, 2), targets, reduction="none")
        nats = (nats * counted).sum(1) / counted.sum(1)
        if behind and new_tokens:
            cache.crop(-behind)
        rows, next_tokens = list(range(len(ids))), first[:, -1].argmax(-1)
        for step in range(new_tokens):
            going = []
            for place, (row, token) in enumerate(zip(rows, next_tokens.tolist(), strict=True)):
                written[row].append(token)
                if token != model.end_token_id and not (until and until in tokenizer.decode([token])):
                    going.append(place)
            if not going or step == new_tokens - 1:
                break
            if len(going) < len(rows):  # an answer that has ended costs nothing
                cache.batch_select_indices(torch.tensor(going))
                rows, mask = [rows[place] for place in going], mask[going]
            mask = torch.cat([mask, mask.new_ones(len(going), 1)], 1)
            next_tokens = read(next_tokens[going][:, None], mask, 1)[:, -1].argmax(-1)
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    return nats.tolist(), [(text.partition(until)[0] if until else text).strip() for text in texts]


def grades(found: str, references: Sequence[str]) -> dict[str, float]:
    """F1, ROUGE-L and containment of a written answer, the best over references."""
    return {
        "f1": f1(found, references),
        "rouge_l": max(rouge_l(found, reference) for reference in references),
        "contains": contains(found, references),
    }


def rouge_l(found: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words, from 0 to 1 (Lin 2004), after SQuAD's normalisation."""
    mine, its = normalised(found).split(), normalised(reference).split()
    if not mine or not its:
        return float(mine == its)
    longest = [0] * (len(its) + 1)
    for word in mine:
        diagonal = 0
        for place, other in enumerate(its, 1):
            diagonal, longest[place] = (
                longest[place],
                diagonal + 1 if word == other else max(longest[place], longest[place - 1]),
            )
    return 2 * longest[-1] / (len(mine) + len(its))


def _batches(ways: Mapping[str, Asked], most: int) -> list[list[str]]:
    """Names of ways, in batches of rows whose memories and tokens are about as long, as padding costs time."""
    found: list[list[str]] = []
    first = (0, 0)
    for name in sorted(ways, key=lambda name: (_width(ways[name]), len(ways[name].ids))):
        size = _width(ways[name]), len(ways[name].ids)
        alike = found and all(large <= 1.5 * small + 64 for large, small in zip(size, first, strict=True))
        if not alike or len(found[-1]) == most:
            found.append([])
            first = size
        found[-1].append(name)
    return found


def _width(asked: Asked) -> int:
    return asked.memory.states.shape[4]


def _padded(rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Join rows of tokens: their ids and mask, int64 `[B, T]`, with zeros for padding."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        here = slice(width - len(row), width) if left else slice(len(row))
        ids[index, here], mask[index, here] = torch.tensor(row), 1
    return ids, mask
