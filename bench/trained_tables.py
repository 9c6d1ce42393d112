"""The tables of memories that training has made better: anchors, the packaged adapter, and refined memories."""

from collections.abc import Iterator

from .markdown import interval, records, table
from .memory_tables import RIVALS, cell, closed_by, told_values

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
            foreign = [cell(closed, f"foreign_{arm}_{slots}") for arm in arms]
            yield str(head["segments"]), str(slots), *cells, interval(better[f"anchored_{slots}"]), *foreign


def memories_in_short() -> str:
    """Return the table of the README: what memories of segments of novels close, and rivals of as many slots."""
    matched, packaged = closed_by("matched_novels_smollm2"), closed_by("packaged_novels_smollm2")
    cases = (("matched, without training", matched, "matched"),
             ("**with the adapter that comes with the package**, heads share slots", packaged, "anchored"),
             (RIVALS["attended"], matched, "attended"), (RIVALS["expected"], matched, "expected"),
             (RIVALS["raw"], matched, "raw"))  # fmt: skip
    rows = [(what, *(interval(closed[f"{arm}_{n}", "full"]) for n in (64, 16))) for what, closed, arm in cases]
    return table(("kept of each 256 tokens", "64 slots", "16 slots"), rows)


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
    arms = {"anchored": "**anchored**", "adaptive": "matched", "attended_adaptive": RIVALS["attended"],
            "raw": RIVALS["raw"]}  # fmt: skip
    rows = [(what, *(interval(gained[f"{arm}_{ratio}"]) for ratio in (4, 8, 16))) for arm, what in arms.items()]
    rows.append(("anchored is better than matched by, nats a token", *(interval(better[r]) for r in (4, 8, 16))))
    return table(("kept", "1/4", "1/8", "1/16"), rows)


def packaged_pairs() -> str:
    """Return the table of values of keys that are told behind the packaged adapter's memories of a quarter."""
    _, *found = records("packaged_pairs_smollm2")
    better = {r["pairs"]: r for r in found if r.get("nats_better_than") == "adaptive"}
    arms = ("nothing", "adaptive_4", "anchored_4", "full")
    rows = [(str(pairs), *cells, interval(better[pairs])) for pairs, cells in told_values(found, arms)]
    names = ("pairs", "behind nothing", "matched", "**anchored**", "the whole text",
             "anchored is better than matched by, nats a token")  # fmt: skip
    return table(names, rows)


def anchored_chains() -> str:
    """Return the table of seven segments in 152 slots: the oldest forgotten, or all matched again, or once."""
    arms = {"raw": RIVALS["raw"], "matched": "matched, uniform", "adaptive": "matched, adaptive",
            "anchored": "**anchored, adaptive**", "foreign_adaptive": "matched, adaptive, of another text",
            "foreign_anchored": "anchored, adaptive, of another text"}  # fmt: skip
    files = {"21 slots of each": "anchored_adaptive_chains", "64 of each, matched again": "packaged_chains",
             "128 of each, matched again once": "packaged_chains_once"}  # fmt: skip
    rows = []
    for what, name in files.items():
        head, closed = records(f"{name}_smollm2")[0], closed_by(f"{name}_smollm2")
        rows += [
            (f"{what}, {head['chains']} places", label, interval(closed[f"{arm}_152_of_7", "full_of_7"]))
            for arm, label in arms.items()
            if (f"{arm}_152_of_7", "full_of_7") in closed
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
    arms = {"anchored": "**anchored**", "matched": "matched", "attended": RIVALS["attended"], "raw": RIVALS["raw"]}
    return _gained("answers_anchored_xquad_smollm2", {f"{arm}_4": what for arm, what in arms.items()}, "1/4")


def _gained(name: str, arms: dict[str, str], size: str) -> str:
    """Return the table of what answers gain from memories of a size, in all measures, by arm of a result file."""
    return table((f"kept, {size}", "nats", "F1", "containment"), _gained_rows(name, arms))


def _gained_rows(name: str, arms: dict[str, str]) -> list[tuple[str, ...]]:
    gained = {(r["gained_by"], r["of"]): r for r in records(name) if "gained_by" in r}
    return [(what, *(interval(gained[arm, of]) for of in ("nats", "f1", "contains"))) for arm, what in arms.items()]


def adapted_reading() -> str:
    """Return the table of how novels are read behind anchored memories, by the base model and by adapters, too."""
    runs = [_adapted("adapted_novels_smollm2"), _adapted("adapted_foreign_novels_smollm2")]
    arms = (("the last 32 tokens before it", "tail", "adapted_tail"),
            ("these, and a memory of 16 slots", "anchored_16", "adapted_16"),
            ("these, and a memory of 64 slots", "anchored_64", "adapted_64"),
            ("the whole segment before it", "full", "adapted_full"),
            ("the last 32 tokens, and another novel's memory, 16 slots", "foreign_anchored_16", "foreign_adapted_16"),
            ("the same, 64 slots", "foreign_anchored_64", "foreign_adapted_64"))  # fmt: skip
    rows = []
    for what, base, adapted in arms:
        cells = [run["nats"][adapted] + f", {run['better'][adapted, base]}" for run in runs]
        rows.append((what, runs[0]["nats"][base], *cells))
    names = ("a segment is read behind", "by the base model: nats a token, share of its gap",
             "**by adapters, too**: the same, better by", "these, taught that another text's is none")  # fmt: skip
    return table(names, rows)


def _adapted(name):
    """Nats a token of each arm of a run of bench.adapted, with the share that it closes; and how much better it is."""
    found = records(name)[1:]
    closed = {r["closed_by"]: f", {r['mean']:.3f}" for r in found if "closed_by" in r}
    nats = {r["arm"]: f"{r['nats_per_token']:.4f}" for r in found if "nats_per_token" in r}
    better = {(r["arm"], r["nats_better_than"]): interval(r) for r in found if "nats_better_than" in r}
    return {"nats": {arm: value + closed.get(arm, "") for arm, value in nats.items()}, "better": better}


# Ways to refine memories, by what a result file calls them.
_REFINED = {
    "": "**refined in 16 steps**",
    " asked": "by what asks for it alone",
    " continued": "by how the model goes on alone",
    " other": "by what asks for another text",
}


def refined_answers() -> str:
    """Return the table of what questions about paragraphs gain from memories that were refined to them."""
    ways = {f"adaptive+16{way}": what for way, what in _REFINED.items() if way != " asked"}
    arms = {"adaptive_16": "matched, adaptive, as it is", **ways}
    arms |= {"attended_adaptive_16": "most attended, own values, adaptive", "raw_16": RIVALS["raw"]}
    rows = _gained_rows("refine_answers_smollm2", arms)
    # The same questions, before there was another way.
    rows[2:2] = _gained_rows("refine_asked_answers_smollm2", {"adaptive+16": _REFINED[" asked"]})
    return table(("kept, 1/16", "nats", "F1", "containment"), rows)


def refined_novels() -> str:
    """Return the table of how novels are read on behind memories that were refined to the segment before."""
    name = "refine_novels_smollm2"
    nats = {r["arm"]: r["nats_per_token"] for r in records(name) if "nats_per_token" in r}
    closed = {r["closed_by"]: r for r in records(name) if "closed_by" in r}
    better = {(r["arm"], r["nats_better_than"]): r for r in records(name) if "nats_better_than" in r}
    arms = {"adaptive_16": "matched, adaptive, as it is"}
    arms |= {f"adaptive_16+16{way}": what for way, what in _REFINED.items()}
    rows = [
        (
            what,
            f"{nats[arm]:.4f}",
            interval(closed[arm]),
            interval(better[arm, "adaptive_16"]) if (arm, "adaptive_16") in better else "–",
        )
        for arm, what in arms.items()
    ]
    return table(("16 slots", "nats a token", "share of the gap", "better than as it is by, nats a token"), rows)


TABLES = {
    "memories_in_short": memories_in_short,
    "anchored_memories": anchored_memories,
    "packaged_memories": packaged_memories,
    "packaged_answers": packaged_answers,
    "packaged_pairs": packaged_pairs,
    "anchored_chains": anchored_chains,
    "text_adapter": text_adapter,
    "adapted_reading": adapted_reading,
    "anchored_answers": anchored_answers,
    "refined_answers": refined_answers,
    "refined_novels": refined_novels,
}
