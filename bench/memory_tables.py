"""The tables of matched memories and their rivals: what they close, by kind of text, and what they answer."""

import itertools
from collections.abc import Iterator

from .markdown import interval, records, table

# Kinds of text that matched memories were measured on.
MATCHED_KINDS = ("novels", "wikipedia", "dialogue", "help", "code")
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
    arms, sizes = {"matched": "**matched**", **_RIVALS}, (64, 32, 16, 8)
    rows = [
        (what, *(_cell(closed, f"{arm}_{slots}") for slots in sizes))
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
    for arm, what in {"matched": "**matched**", **_RIVALS, "foreign": "matched, of another text"}.items():
        if (f"{arm}_64", "full") in closed:
            cells = ((_cell(closed, f"{arm}_{slots}"), better.get((arm, slots), "–")) for slots in (64, 16))
            rows.append((what, *itertools.chain(*cells)))
    rows.append(("another text, all of it", _cell(closed, "foreign"), "–", "–", "–"))
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
    arms = {"matched": "**matched**", **_RIVALS}
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


# Kinds of text that anchored memories were measured on, with slots shared among heads.
ANCHORED_KINDS = ("novels", "wikipedia", "code", "help")
# Kinds that it was measured on when it had been rounded to bfloat16.
ROUNDED_KINDS = ("dialogue", "code")


def anchored_memories() -> str:
    """Return the table of what training from the match adds to memories of as many slots, by kind of text."""
    rows = []
    cases = [("anchored_novels", "matched", "novels")]
    cases += [(f"anchored_adaptive_{kind}", "adaptive", kind) for kind in ANCHORED_KINDS]
    cases += [(f"rounded_{kind}", "adaptive", kind) for kind in ROUNDED_KINDS]
    for name, writer, kind in cases:
        allocation = "uniform" if writer == "matched" else "adaptive"
        for segments, slots, *cells, _, foreign in _beside_closed_form(f"{name}_smollm2", writer):
            rows.append((f"{kind}, {segments}", allocation, slots, *cells, foreign))
    names = ("kind of text, segments", "allocation", "slots", "matched", "**anchored**",
             "anchored is better by, nats a token", "anchored, of another text")  # fmt: skip
    return table(names, rows)


def _beside_closed_form(name: str, writer: str) -> Iterator[tuple[str, ...]]:
    """Compare anchored memories of a result file with those of the closed form, at each number of slots.

    Args:
        name: Name of the file.
        writer: Arm of the closed form: "matched" or "adaptive".

    Yields:
        Segments, slots, what the closed form and anchors close, by how much anchors are better, and what memories of
        another text close, of both.
    """
    head, *found = records(name)
    closed, arms = closed_by(name), (writer, "anchored")
    better = {r["arm"]: r for r in found if r.get("nats_better_than") == writer and "of" not in r}
    for slots in (64, 16, 8):
        if f"anchored_{slots}" in better:
            cells = [interval(closed[f"{arm}_{slots}", "full"]) for arm in arms]
            foreign = [_cell(closed, f"foreign_{arm}_{slots}") for arm in arms]
            yield str(head["segments"]), str(slots), *cells, interval(better[f"anchored_{slots}"]), *foreign


# Kinds of text that the memories of the packaged adapter were measured on.
PACKAGED_KINDS = ("novels", "wikipedia", "dialogue", "help", "code")


def packaged_memories() -> str:
    """Return the table of what the packaged adapter adds to memories of as many slots, by kind of text."""
    rows = []
    for kind in PACKAGED_KINDS:
        for segments, *cells in _beside_closed_form(f"packaged_{kind}_smollm2", "adaptive"):
            rows.append((f"{kind}, {segments}", *cells))
    names = ("kind of text, segments", "slots", "matched", "**anchored**", "anchored is better by, nats a token",
             "matched, of another text", "anchored, of another text")  # fmt: skip
    return table(names, rows)


def packaged_answers() -> str:
    """Return the table of what questions about paragraphs gain from the packaged adapter's memories."""
    _, *found = records("packaged_answers_smollm2")
    gained = {r["gained_by"]: r for r in found if r.get("of") == "nats" and "gained_by" in r}
    paired = (r for r in found if r.get("nats_better_than") == "adaptive")
    better = {r["ratio"]: r for r in paired if r["arm"].startswith("anchored")}
    arms = {"anchored": "**anchored**", "adaptive": "matched", "attended_adaptive": _RIVALS["attended"],
            "raw": _RIVALS["raw"]}  # fmt: skip
    rows = [(what, *(interval(gained[f"{arm}_{ratio}"]) for ratio in (4, 8, 16))) for arm, what in arms.items()]
    rows.append(("anchored is better than matched by, nats a token", *(interval(better[r]) for r in (4, 8, 16))))
    return table(("kept", "1/4", "1/8", "1/16"), rows)


def packaged_pairs() -> str:
    """Return the table of values of keys that are told behind the packaged adapter's memories of a quarter."""
    _, *found = records("packaged_pairs_smollm2")
    better = {r["pairs"]: r for r in found if r.get("nats_better_than") == "adaptive"}
    rows = []
    for pairs in dict.fromkeys(r["pairs"] for r in found):
        told = {r["arm"]: r for r in found if r["pairs"] == pairs and "nats_per_answer_token" in r}
        arms = (told[arm] for arm in ("nothing", "adaptive_4", "anchored_4", "full"))
        cells = (f"{r['nats_per_answer_token']:.3f}, {r['contains']:.3f}" for r in arms)
        rows.append((str(pairs), *cells, interval(better[pairs])))
    names = ("pairs", "behind nothing", "matched", "**anchored**", "the whole text",
             "anchored is better than matched by, nats a token")  # fmt: skip
    return table(names, rows)


def anchored_chains() -> str:
    """Return the table of seven segments in 152 slots: the oldest forgotten, or all matched again, or once."""
    arms = {"raw": _RIVALS["raw"], "matched": "matched, uniform", "adaptive": "matched, adaptive",
            "anchored": "**anchored, adaptive**"}  # fmt: skip
    files = {"21 slots of each": "anchored_adaptive_chains", "64 of each, matched again": "packaged_chains",
             "128 of each, matched again once": "packaged_chains_once"}  # fmt: skip
    rows = []
    for what, name in files.items():
        head, closed = records(f"{name}_smollm2")[0], closed_by(f"{name}_smollm2")
        rows += [
            (f"{what}, {head['chains']} places", label, interval(closed[f"{arm}_152_of_7", "full_of_7"]))
            for arm, label in arms.items()
        ]
    return table(("kept", "memory", "share of all seven"), rows)


def text_adapter() -> str:
    """Return the table of matched memories behind an adapter that has learned how its texts are written."""
    name = "text_adapter_novels_smollm2"
    nats = {r["arm"]: r["nats_per_token"] for r in records(name) if "nats_per_token" in r}
    closed = closed_by(name)
    arms = {
        "tail": "the last 32 tokens before it", "raw_64": "these, and 64 tokens more",
        "foreign_adaptive_64": "these, and a memory of another novel, 64 slots, adaptive",
        "matched_16": "these, and a matched memory of 16 slots", "adaptive_16": "the same, adaptive",
        "attended_64": "these, and the 64 most attended keys, own values",
        "matched_64": "these, and a matched memory of 64 slots", "adaptive_64": "**the same, adaptive**",
        "full": "the whole segment before it",
    }  # fmt: skip
    ends = {"tail": "0", "full": "1"}
    rows = [(what, f"{nats[arm]:.4f}", ends.get(arm) or interval(closed[arm, "full"])) for arm, what in arms.items()]
    return table(("a segment is read behind", "nats a token", "share of the gap"), rows)


def anchored_answers() -> str:
    """Return the table of what questions about paragraphs gain from anchored memories, and from matched ones."""
    arms = {"anchored": "**anchored**", "matched": "matched", "attended": _RIVALS["attended"], "raw": _RIVALS["raw"]}
    return _gained("answers_anchored_xquad_smollm2", {f"{arm}_4": what for arm, what in arms.items()}, "1/4")


def _gained(name: str, arms: dict[str, str], size: str) -> str:
    """Return the table of what answers gain from memories of a size, in all measures, by arm of a result file."""
    gained = {(r["gained_by"], r["of"]): r for r in records(name) if "gained_by" in r}
    rows = [(what, *(interval(gained[arm, of]) for of in ("nats", "f1", "contains"))) for arm, what in arms.items()]
    return table((f"kept, {size}", "nats", "F1", "containment"), rows)


def refined_answers() -> str:
    """Return the table of what questions about paragraphs gain from memories that were refined to them."""
    arms = {
        "adaptive_16": "matched, adaptive, as it is", "adaptive+4": "refined in 4 steps",
        "adaptive+16": "**refined in 16 steps**", "adaptive+4 other": "refined in 4 steps, asked for another text",
        "adaptive+16 other": "refined in 16 steps, asked for another text",
        "attended_adaptive_16": "most attended, own values, adaptive", "raw_16": _RIVALS["raw"],
    }  # fmt: skip
    return _gained("refine_answers_smollm2", arms, "1/16")


def refined_novels() -> str:
    """Return the table of how a novel is read on behind memories that were refined to the segment before."""
    name = "refine_novels_smollm2"
    nats = {r["arm"]: r["nats_per_token"] for r in records(name) if "nats_per_token" in r}
    closed = {r["closed_by"]: r for r in records(name) if "closed_by" in r}
    paired = [r for r in records(name) if "nats_better_than" in r]
    better = {r["arm"]: r for r in paired if not r["nats_better_than"].endswith(" other")}
    arms = {"16": "matched, adaptive, as it is"}
    for steps in (4, 16):
        arms |= {
            f"16+{steps}": f"refined in {steps} steps",
            f"16+{steps} other": f"refined in {steps} steps, asked for another text",
        }
    rows = []
    for arm, what in arms.items():
        arm = f"adaptive_{arm}"
        cells = (interval(closed[arm]), interval(better[arm]) if arm in better else "–")
        rows.append((what, f"{nats[arm]:.4f}", *cells))
    return table(("16 slots", "nats a token", "share of the gap", "better than as it is by, nats a token"), rows)


# Kinds of text that memories of adaptive allocation were measured on.
ADAPTIVE_KINDS = ("novels", "wikipedia")


def adaptive_answers() -> str:
    """Return the table of what questions about paragraphs gain where heads share slots, and where they do not."""
    gained = {(r["gained_by"], r["of"]): r for r in records("answers_adaptive_xquad_smollm2") if "gained_by" in r}
    arms = {
        "adaptive": "**matched, adaptive**", "attended_adaptive": "most attended, own values, adaptive",
        "kvzip_adaptive": "KVzip, adaptive (reads the text twice)", "matched": "matched, uniform",
        "attended": "most attended, own values, uniform", "kvzip": "KVzip, uniform", "raw": _RIVALS["raw"],
    }  # fmt: skip
    rows = []
    for arm, what in arms.items():
        nats = [interval(gained[f"{arm}_{ratio}", "nats"]) for ratio in (4, 8, 16)]
        rows.append((what, *nats, interval(gained[f"{arm}_4", "f1"]), interval(gained[f"{arm}_8", "f1"])))
    return table(("kept", "1/4, nats", "1/8, nats", "1/16, nats", "1/4, F1", "1/8, F1"), rows)


def adaptive_pairs() -> str:
    """Return the table of values of keys that are told behind memories of a quarter of JSON objects."""
    arms = ("nothing", "raw_4", "matched_4", "attended_adaptive_4", "adaptive_4", "full")
    rows = []
    for name, characters in (("keys", 8), ("pairs", 36)):
        _, *found = records(f"answers_adaptive_{name}_smollm2")
        for pairs in dict.fromkeys(r["pairs"] for r in found):
            told = {r["arm"]: r for r in found if r["pairs"] == pairs and "nats_per_answer_token" in r}
            cells = (f"{told[arm]['nats_per_answer_token']:.3f}, {told[arm]['contains']:.3f}" for arm in arms)
            rows.append((f"{pairs} of {characters} characters", *cells))
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
    "anchored_memories": anchored_memories,
    "packaged_memories": packaged_memories,
    "packaged_answers": packaged_answers,
    "packaged_pairs": packaged_pairs,
    "anchored_chains": anchored_chains,
    "text_adapter": text_adapter,
    "anchored_answers": anchored_answers,
    "refined_answers": refined_answers,
    "adaptive_answers": adaptive_answers,
    "adaptive_pairs": adaptive_pairs,
    "adaptive_memories": adaptive_memories,
}
