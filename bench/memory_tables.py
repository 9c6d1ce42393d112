"""The tables of matched memories and their rivals: what they close, by kind of text, and what they answer."""

from .markdown import interval, records, table

# Kinds of text that matched memories were measured on.
MATCHED_KINDS = ("novels", "wikipedia", "dialogue", "code")
_RIVALS = {
    "attended": "most attended, own values",
    "raw": "raw tokens",
    "snapkv": "SnapKV",
    "expected": "Expected Attention",
    "keydiff": "KeyDiff",
    "kvzip": "KVzip",
    "even": "evenly spaced",
    "learned": "learned memory tokens",
}


def closed_by(name: str) -> dict[tuple[str, str], dict]:
    """Return what each arm of a result file closes of the gap to `full` or `full_of_7`, by arm and gap."""
    return {(r["closed_by"], r["of"]): r for r in records(name) if "closed_by" in r}


def matched_memories() -> str:
    """Return the table of what matched memories, and the strongest rival of as many slots, close of the gap."""
    rows = []
    for kind in MATCHED_KINDS:
        head, *found = records(f"matched_{kind}_smollm2")
        closed = closed_by(f"matched_{kind}_smollm2")
        better = {(r["nats_better_than"], r["slots"]): r for r in found if "nats_better_than" in r and "of" not in r}
        for slots in (64, 16):
            if (f"matched_{slots}", "full") not in closed:
                continue
            rivals = [arm for arm in _RIVALS if (f"{arm}_{slots}", "full") in closed]
            best = max(rivals, key=lambda arm: closed[f"{arm}_{slots}", "full"]["mean"])
            cells = [
                interval(closed[f"matched_{slots}", "full"]),
                f"{_RIVALS[best]}: {interval(closed[f'{best}_{slots}', 'full'])}",
            ]
            cells += [interval(better[best, slots]), interval(closed[f"raw_{slots}", "full"])]
            cells += [_cell(closed, f"foreign_{slots}"), _cell(closed, "foreign")]
            rows.append((f"{kind}, {head['segments']}", str(slots), *cells))
    names = ("kind of text, segments", "slots", "**matched**", "best rival", "matched is better by, nats a token",
             "raw tokens", "matched, of another text", "another text, all of it")  # fmt: skip
    return table(names, rows)


def _cell(closed: dict[tuple[str, str], dict], arm: str) -> str:
    return interval(closed[arm, "full"]) if (arm, "full") in closed else "–"


def matched_rivals() -> str:
    """Return the table of all rivals on novels."""
    closed = closed_by("matched_novels_smollm2")
    arms = {"matched": "**matched**", **_RIVALS}
    rows = [
        (what, *(_cell(closed, f"{arm}_{slots}") for slots in (64, 16)))
        for arm, what in arms.items()
        if (f"{arm}_64", "full") in closed
    ]
    return table(("kept", "64 slots", "16 slots"), rows)


def memory_answers() -> str:
    """Return the table of what questions about paragraphs gain from memories of them, and from rivals."""
    gained = {(r["gained_by"], r["of"]): r for r in records("answers_xquad_smollm2") if "gained_by" in r}
    arms = {"matched": "**matched**", **_RIVALS}
    rows = []
    for arm, what in arms.items():
        if (f"{arm}_4", "nats") in gained:
            nats = [interval(gained[f"{arm}_{ratio}", "nats"]) for ratio in (4, 8, 16)]
            rows.append((what, *nats, interval(gained[f"{arm}_4", "f1"])))
    return table(("kept", "1/4, nats", "1/8, nats", "1/16, nats", "1/4, F1"), rows)


TABLES = {
    "matched_memories": matched_memories,
    "matched_rivals": matched_rivals,
    "memory_answers": memory_answers,
}
