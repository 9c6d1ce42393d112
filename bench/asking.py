"""Asks questions behind memories and raw passages, in one batch of ways, and grades the answers without a judge."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import cross_entropy

from r3mem_fast import Memory, R3MemPipeline
from r3mem_fast.integrations.compat import cache_argument
from r3mem_fast.memory.slots import slots_of
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
        return slots_in(self.memory) + len(self.carried) + len(self.ids)


def slots_in(memory: Memory) -> int:
    """Slots that a head of a matched memory of one row has on average, without pinned ones, rounded up."""
    return int(slots_of(memory, torch.zeros(1, dtype=torch.int64)).filled()[0])


@torch.no_grad()
def nats(pipeline: R3MemPipeline, ways: Mapping[str, Asked], answer: Sequence[int], most: int = 8) -> dict[str, float]:
    """Negative log-likelihood of an answer, in nats a token, asked in each way.

    Args:
        pipeline: The pipeline.
        ways: The question by way.
        answer: Token ids of the answer.
        most: Ways that are read at one time.
    """
    model, base, found = pipeline.model, pipeline.model.plain_model, {}
    for names in _batches(ways, most):
        rows = [[*ways[name].carried, *ways[name].ids, *answer[:-1]] for name in names]
        ids, mask = _left_padded(rows)
        memory = rows_of_one([ways[name].memory for name in names])
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with model.disable_adapters():
            cache = cache_argument(base, memory.to_cache(model))
            last = {"logits_to_keep": len(answer)} if model.slices_logits else {}
            logits = base(ids, attention_mask=mask, position_ids=positions, use_cache=True, **cache, **last).logits
        targets = torch.tensor([list(answer)] * len(names))
        logits = logits[:, -len(answer) :].float().transpose(1, 2)
        found |= dict(zip(names, cross_entropy(logits, targets, reduction="none").mean(1).tolist(), strict=True))
    return found


@torch.no_grad()
def answers(
    pipeline: R3MemPipeline, ways: Mapping[str, Asked], *, new_tokens: int, until: str | None = None, most: int = 8
) -> dict[str, str]:
    """What is answered, greedily, asked in each way.

    Args:
        pipeline: The pipeline.
        ways: The question by way.
        new_tokens: Tokens of an answer at most.
        until: What an answer ends with, and is not part of it; None: nothing.
        most: Ways that are asked at one time.
    """
    found: dict[str, str] = {}
    settings = {} if until is None else {"stop_strings": [until], "tokenizer": pipeline.tokenizer}
    for names in _batches(ways, most):
        ids, mask = _left_padded([ways[name].ids for name in names])
        memory = rows_of_one([ways[name].memory for name in names])
        output = pipeline.model.generate(
            ids, mask, memory=memory, max_new_tokens=new_tokens, do_sample=False, **settings
        )
        texts = pipeline.codec.continuations(output[:, ids.shape[1] :])
        if until is not None:
            texts = [text.partition(until)[0] for text in texts]
        found |= dict(zip(names, texts, strict=True))
    return found


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


def _left_padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :], mask[index, width - len(row) :] = torch.tensor(row), 1
    return ids, mask
