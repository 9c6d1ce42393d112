"""Segments of held-out texts, at which memories are measured, and intervals of what is measured."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

CHAIN, LONG = 7, 64
_RESAMPLES = 10_000


@dataclasses.dataclass
class Place:
    """A segment to be read, with those before it.

    Attributes:
        text: Index of the text that it stands in.
        segments: int64 `[n + 1, segment_length]`, the segment itself the last.
    """

    text: int
    segments: torch.Tensor


def places_of(
    texts: Sequence[str], tokenizer: Any, length: int, *, held_out: float, count: int, before: int = CHAIN
) -> list[Place]:
    """Cut the ends of texts, which training did not see, into segments of `length` tokens; `count` places at most.

    Args:
        texts: The texts.
        tokenizer: Tokenizer of the model.
        length: Tokens of a segment.
        held_out: Share at the end of each text.
        count: Number of places.
        before: Segments before each place.

    Raises:
        ValueError: There are fewer than two places.
    """
    places: list[Place] = []
    for index, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        ids = torch.tensor(ids[len(ids) - int(len(ids) * held_out) :])
        segments = ids[: len(ids) // length * length].view(-1, length)
        places += [Place(index, segments[i - before : i + 1]) for i in range(before, len(segments))]
    if len(places) < 2:
        raise ValueError(f"the held-out texts have {len(places)} segments with {before} before them; 2 are needed")
    return spread(places, count)


def begun(opening: Sequence[int], ids: torch.Tensor, *, replace: bool = False) -> torch.Tensor:
    """Put the tokens that begin a text before rows of token ids.

    Args:
        opening: Those tokens, see `r3mem_fast.data.text.opening_ids`.
        ids: int64 `[B, T]`.
        replace: Whether they take the places of the first tokens, so that there are T tokens still.
    """
    first = ids.new_tensor(opening).expand(len(ids), -1)
    return torch.cat([first, ids[:, len(opening) if replace else 0 :]], 1)


def spread(places: list[Place], count: int) -> list[Place]:
    """Choose at most `count` of the places, at equal distances, so that they come from all texts."""
    step = max(1.0, len(places) / count)
    return [places[int(i * step)] for i in range(min(count, len(places)))]


def foreign_of(places: list[Place]) -> list[Place]:
    """Choose for each place one from another text: the first from half-way round the list on.

    If there is only one text, it is the place half-way round.
    """
    found = []
    for index, place in enumerate(places):
        others = [places[(index + len(places) // 2 + i) % len(places)] for i in range(len(places))]
        found.append(next((other for other in others if other.text != place.text), others[0]))
    return found


def interval(won: torch.Tensor, wanted: torch.Tensor, seed: int = 0) -> dict[str, float]:
    """Return the mean of `won` over that of `wanted`, with the bootstrapped interval that holds it with 95 %."""
    picks = torch.randint(len(won), (_RESAMPLES, len(won)), generator=torch.Generator().manual_seed(seed))
    ratios = won[picks].mean(1) / wanted[picks].mean(1)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"mean": round((won.mean() / wanted.mean()).item(), 4), "low": round(low, 4), "high": round(high, 4)}
