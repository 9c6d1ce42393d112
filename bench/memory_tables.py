"""The tables of matched memories and their rivals: what they close, by kind of text, and what they answer."""

import itertools
from collections.abc import Iterator, Sequence

from .markdown import interval, records, table

# Kinds of text that matched memories were measured on.
MATCHED_KINDS = ("novels", "wikipedia", "dialogue", "help", "code")
# Kinds of rivals of as many slots.
RIVALS = {
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
            rivals = [arm for arm in RIVALS if (f"{arm}_{slots}", "full") in closed]
            best = max(rivals, key=lambda arm: closed[f"{arm}_{slots}", "full"]["mean"])
            cells = [
                interval(closed[f"matched_{slots}", "full"]),
                f"{RIVALS[best]}: {interval(closed[f'{best}_{slots}', 'full'])}",
            ]
            cells += [interval(better[best, slots]), interval(closed[f"raw_{slots}", "full"])]
            cells += [cell(closed, f"foreign_{slots}"), cell(closed, "foreign")]
            rows.append((f"{kind}, {head['segments']}", str(slots), *cells))
    names = ("kind of text, segments", "slots", "**matched**", "best rival", "matched is better by, nats a token",
             "raw tokens", "matched, of another text", "another text, all of it")  # fmt: skip
    return table(names, rows)


def cell(closed: dict[tuple[str, str], dict], arm: str) -> str:
    """Return what an arm closes of the gap to `full` as a cell, a dash if it was not measured."""
    return interval(closed[arm, "full"]) if (arm, "full") in closed else "–"


def matched_sizes() -> dict[tuple[str, str], dict]:
    """Return what arms of all sizes close on the same places in novels, as `closed_by` does."""
    names = ("matched_novels_smollm2", "matched_sizes_smollm2")
    heads = [{key: records(name)[0][key] for key in ("kind", "segments", "tail", "model", "dtype")} for name in names]
    assert heads[0] == heads[1], heads
    # What both have is the same run twice.
    return {**closed_by(names[1]), **closed_by(names[0])}


def matched_rivals() -> str:
    """Return the table of all rivals on novels, by slots."""
    closed = matched_sizes()
    arms, sizes = {"matched": "**matched**", **RIVALS}, (64, 32, 16, 8)
    rows = [
        (what, *(cell(closed, f"{arm}_{slots}") for slots in sizes))
        for arm, what in arms.items()
        if (f"{arm}_64", "full") in closed
    ]
    return table(("kept", *(f"{slots} slots" for slots in sizes)), rows)


def matched_second_model() -> str:
    """Return the table of all rivals on novels, read by the second model."""
    found = records("matched_novels_gemma3_270m")
    closed = closed_by("matched_novels_gemma3_270m")
    better = {(r["nats_better_than"], r["slots"]): interval(r) for r in found if "nats_better_than" in r}
    rows = []
    for arm, what in {"matched": "**matched**", **RIVALS, "foreign": "matched, of another text"}.items():
        if (f"{arm}_64", "full") in closed:
            cells = ((cell(closed, f"{arm}_{slots}"), better.get((arm, slots), "–")) for slots in (64, 16))
            rows.append((what, *itertools.chain(*cells)))
    rows.append(("another text, all of it", cell(closed, "foreign"), "–", "–", "–"))
    names = (
        "kept",
        "64 slots",
        "matched is better by, nats a token",
        "16 slots",
        "matched is better by, nats a token",
    )
    return table(names, rows)


def memory_answers() -> str:
    """Return the table of what questions about paragraphs gain from memories of them, and from rivals."""
    gained = {(r["gained_by"], r["of"]): r for r in records("answers_xquad_smollm2") if "gained_by" in r}
    arms = {"matched": "**matched**", **RIVALS}
    rows = []
    for arm, what in arms.items():
        if (f"{arm}_4", "nats") in gained:
            nats = [interval(gained[f"{arm}_{ratio}", "nats"]) for ratio in (4, 8, 16)]
            rows.append((what, *nats, interval(gained[f"{arm}_4", "f1"])))
    return table(("kept", "1/4, nats", "1/8, nats", "1/16, nats", "1/4, F1"), rows)


def memory_questions() -> str:
    """Return the table of what answers cost behind memories of a quarter of a text, by kind of question."""
    rows = []
    for kind, name in (("XQuAD", "xquad"), ("QMSum", "qmsum"), ("key-value pairs", "pairs")):
        _, *found = records(f"answers_{name}_smollm2")
        for pairs in dict.fromkeys(r.get("pairs") for r in found):
            some = [r for r in found if r.get("pairs") == pairs]
            count = next(r["questions"] for r in some if "questions" in r)
            nats = {r["arm"]: f"{r['nats_per_answer_token']:.3f}" for r in some if "arm" in r}
            better = next(r for r in some if r.get("nats_better_than") == "attended" and r["ratio"] == 4)
            what = kind if pairs is None else f"{pairs} {kind}"
            arms = ("nothing", "raw_4", "attended_4", "matched_4", "full")
            rows.append((f"{what}, {count}", *(nats[arm] for arm in arms), interval(better)))
    names = ("questions", "behind nothing", "the last quarter", "most attended", "**matched**", "the whole text",
             "matched is better than attended by")  # fmt: skip
    return table(names, rows)


# Kinds of text that memories of adaptive allocation were measured on.
ADAPTIVE_KINDS = ("novels", "wikipedia")


def adaptive_answers() -> str:
    """Return the table of what questions about paragraphs gain where heads share slots, and where they do not."""
    gained = {(r["gained_by"], r["of"]): r for r in records("answers_adaptive_xquad_smollm2") if "gained_by" in r}
    arms = {
        "adaptive": "**matched, adaptive**", "attended_adaptive": "most attended, own values, adaptive",
        "kvzip_adaptive": "KVzip, adaptive (reads the text twice)", "matched": "matched, uniform",
        "attended": "most attended, own values, uniform", "kvzip": "KVzip, uniform", "raw": RIVALS["raw"],
    }  # fmt: skip
    rows = []
    for arm, what in arms.items():
        nats = [interval(gained[f"{arm}_{ratio}", "nats"]) for ratio in (4, 8, 16)]
        rows.append((what, *nats, interval(gained[f"{arm}_4", "f1"]), interval(gained[f"{arm}_8", "f1"])))
    return table(("kept", "1/4, nats", "1/8, nats", "1/16, nats", "1/4, F1", "1/8, F1"), rows)


def told_values(found: list[dict], arms: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield numbers of pairs, and how each arm tells a value of so many: nats a token, and the share of answers."""
    for pairs in dict.fromkeys(r["pairs"] for r in found):
        told = {r["arm"]: r for r in found if r["pairs"] == pairs and "nats_per_answer_token" in r}
        yield pairs, [f"{told[arm]['nats_per_answer_token']:.3f}, {told[arm]['contains']:.3f}" for arm in arms]


def adaptive_pairs() -> str:
    """Return the table of values of keys that are told behind memories of a quarter of JSON objects."""
    arms = ("nothing", "raw_4", "matched_4", "attended_adaptive_4", "adaptive_4", "full")
    rows = []
    for name, characters in (("keys", 8), ("pairs", 36)):
        _, *found = records(f"answers_adaptive_{name}_smollm2")
        rows += [(f"{pairs} of {characters} characters", *cells) for pairs, cells in told_values(found, arms)]
    names = ("pairs", "behind nothing", "the last quarter", "matched, uniform", "most attended, adaptive",
             "**matched, adaptive**", "the whole text")  # fmt: skip
    return table(names, rows)


def adaptive_memories() -> str:
    """Return the table of how a text is read on where heads share their slots, and where they do not."""
    rows = []
    for kind in ADAPTIVE_KINDS:
        head, *found = records(f"adaptive_{kind}_smollm2")
        closed = closed_by(f"adaptive_{kind}_smollm2")
        better = {r["arm"]: r for r in found if r.get("nats_better_than") == "matched" and "arm" in r}
        for slots in sorted({r["slots"] for r in better.values()}, reverse=True):
            arms = ("matched", "attended_adaptive", "adaptive")
            cells = [interval(closed[f"{arm}_{slots}", "full"]) for arm in arms]
            rows.append((f"{kind}, {head['segments']}", str(slots), *cells, interval(better[f"adaptive_{slots}"])))
    names = ("kind of text, segments", "slots", "matched, uniform", "most attended, own values, adaptive",
             "**matched, adaptive**", "adaptive is better than uniform by, nats a token")  # fmt: skip
    return table(names, rows)


def second_model() -> str:
    """Return the table of how the second model reads, beside the embedded one."""
    columns = ("nats_per_token", "nats_per_token_without_opening", "nats_per_byte")
    rows = [(r["model"], *(f"{r[name]:.3f}" for name in columns)) for r in records("second_model_gemma3_270m")]
    names = ("model", "nats a token of a novel", "without the token that begins a text", "nats a byte")
    return table(names, rows)


def second_model_side_bits() -> str:
    """Return the table of what side bits cost the second model, untrained."""
    rows = [
        (str(r["bits"] or "ordinary network"), f"{r['perplexity']:.2f}", f"{r['ratio']:.4f}")
        for r in records("perplexity_gemma3_270m")
    ]
    return table(("side bits", "perplexity", "of the ordinary network's"), rows)


TABLES = {
    "second_model": second_model,
    "second_model_side_bits": second_model_side_bits,
    "matched_second_model": matched_second_model,
    "memory_questions": memory_questions,
    "matched_memories": matched_memories,
    "matched_rivals": matched_rivals,
    "memory_answers": memory_answers,
    "adaptive_answers": adaptive_answers,
    "adaptive_pairs": adaptive_pairs,
    "adaptive_memories": adaptive_memories,
}
