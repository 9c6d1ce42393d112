"""Makes a memory of the tensors of its file, and checks that they fit together."""

from typing import Any

import torch

from ..choices import ALLOCATIONS, BEYOND_BUDGET, MEMORY_KINDS, PLACEMENTS, QUERIES
from .file import CARRIED
from .layout import MemoryLayout, Origin
from .states import BATCH, SLOTS, with_gaps


def is_label(label: Any) -> bool:
    """Whether a value can be the label of a row: None, or a level and a name."""
    return label is None or (
        isinstance(label, (tuple, list)) and len(label) == 2 and all(isinstance(part, str) for part in label)
    )


def memory_from(cls: Any, metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    """Make a memory of what a file holds.

    Args:
        cls: `Memory`.
        metadata: Its layout, origin and labels.
        tensors: See `Memory.tensors`.

    Raises:
        ValueError: They do not fit together. Values of a wrong type may raise KeyError, TypeError or AttributeError.
    """
    layout, origin = MemoryLayout(**metadata["layout"]), Origin(**metadata["origin"])
    numbers = (layout.num_memory_tokens, layout.segment_length, layout.readable_segments, layout.segment_overlap + 1)
    if (
        layout.writer not in MEMORY_KINDS
        or layout.queries not in QUERIES
        or layout.allocation not in ALLOCATIONS
        or layout.beyond_budget not in BEYOND_BUDGET
        or layout.placement not in PLACEMENTS
        or not all(type(number) is int and number > 0 for number in numbers)
    ):
        raise ValueError(f"its layout is {layout}")
    if not all(isinstance(part, str) for part in (origin.base, origin.adapter, origin.tokenizer or "")):
        raise ValueError(f"its origin is {origin}")
    segments, seen, labels = tensors["num_segments"].cpu(), tensors["tokens_seen"].cpu(), metadata["labels"]
    rows = len(labels)
    if layout.is_adaptive:
        tensors = {**tensors, **_with_gaps(tensors, rows)}
    states = tensors["states"]
    if not all(c.shape == (rows,) and c.dtype == torch.int64 and (c >= 0).all() for c in (segments, seen)):
        raise ValueError("its tensors are of different numbers of rows")
    if not all(map(is_label, labels)):
        raise ValueError(f"its labels are {labels}")
    unfinished = _ragged(tensors, "unfinished", rows)
    recent = (torch.zeros(0, dtype=torch.int64),) * rows
    if layout.segment_overlap:
        recent = _ragged(tensors, "recent", rows, longest=layout.segment_overlap)
    matched = layout.writer == "matched"
    ages, slots = (tensors["ages"], tensors["slots"].cpu()) if matched else (None, None)
    pinned, refined = (tensors[name].cpu() if matched and name in tensors else None for name in ("pinned", "refined"))
    kept = segments.clamp_max(layout.readable_segments) * layout.num_memory_tokens if slots is None else slots
    fits = states.is_floating_point() and states.dim() == (3 if layout.placement == "input" else 6)
    fits = fits and states.shape[BATCH[layout.placement]] == rows
    fits = fits and kept.shape == (rows,) and kept.dtype == torch.int64 and bool((kept >= 0).all())
    fits = fits and states.shape[SLOTS[layout.placement]] >= (int(kept.max()) if rows else 0)
    for counts in (pinned, refined):
        if fits and counts is not None:
            fits = counts.shape == (rows,) and counts.dtype == torch.int64 and bool((counts >= 0).all())
    if fits:
        beside = torch.zeros_like(kept) if pinned is None else pinned
        shared_by = states.shape[0] * states.shape[3] if layout.is_adaptive else 1
        most = layout.most_slots * shared_by
        fits = bool((kept <= most + beside).all())
        fits = fits and states.shape[SLOTS[layout.placement]] <= most + (int(beside.max()) if rows else 0)
    if fits and ages is not None:
        fits = ages.dtype == torch.int32 and ages.shape == (states.shape[0], *states.shape[2:5])
        fits = fits and bool((ages >= 0).all() and (ages <= layout.reach).all())
    carried = {name.removeprefix(CARRIED): t for name, t in tensors.items() if name.startswith(CARRIED)}
    if any(not (t.is_floating_point() and t.dim() > 1 and len(t) == rows) for t in carried.values()):
        raise ValueError(f"it carries {', '.join(f'{n} {t.dtype} {list(t.shape)}' for n, t in carried.items())}")
    if not fits or (layout.placement == "every_layer" and states.shape[1] != 2):
        raise ValueError(f"its states are {states.dtype} {list(states.shape)}, for {rows} rows of {layout}")
    return cls(
        states,
        segments,
        seen,
        unfinished,
        recent,
        tuple(label and tuple(label) for label in labels),
        layout,
        origin,
        ages,
        slots,
        pinned,
        carried or None,
        refined,
    )


def _with_gaps(tensors, rows):
    """States and ages of a memory whose heads have other numbers of slots, as it has them."""
    states, ages, counts, slots = (tensors[name] for name in ("states", "ages", "head_slots", "slots"))
    pinned = tensors.get("pinned", torch.zeros_like(slots)).cpu()
    shapes = states.dim() == 3 and ages.dim() == 1 and counts.dim() == 3 and slots.shape == pinned.shape == (rows,)
    if not (shapes and len(states) == 2 and len(counts) == rows and (counts >= 0).all() and (ages > 0).all()):
        raise ValueError("its heads' slots are not what it says")
    pinned = torch.minimum(slots.cpu(), pinned)
    return dict(zip(("states", "ages"), with_gaps(states, ages, counts, slots.cpu(), pinned), strict=True))


def _ragged(tensors, name, rows, longest=None):
    """Cut joined token ids into rows by their lengths. Raises ValueError if they do not fit together."""
    ids, lengths = tensors[name].cpu(), tensors[f"{name}_lengths"].cpu()
    fits = lengths.shape == (rows,) and lengths.dtype == torch.int64 and (lengths >= 0).all()
    fits = fits and (longest is None or not rows or lengths.max() <= longest)
    if not fits or ids.shape != (lengths.sum(),) or ids.dtype != torch.int64 or (ids < 0).any():
        raise ValueError(f"its {name} tokens are not what it says")
    return ids.split(lengths.tolist())
