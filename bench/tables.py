"""Makes the documentation's result tables from the result files.

A table stands in a page between `<!-- table: NAME -->` and `<!-- end -->`. `python -m bench.tables` writes each of
them anew from `bench/results/`, so that no figure is copied by hand; a test asserts that this changes nothing.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from r3mem_fast.cli import parser
from r3mem_fast.config import R3MemConfig
from r3mem_fast.settings import default_text, settings_of
from r3mem_fast.training.settings import RefineSettings, RememberSettings, TrainSettings

from . import coupling_tables, inference_tables, kernel_tables, memory_tables, store_tables, trained_tables
from .markdown import ROOT, interval, records, table

_BLOCK = re.compile(r"(<!-- table: ([a-z_0-9]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_ARMS = {
    "plain": "plain",
    "checkpoint": "checkpointing, every layer",
    "checkpoint-offload": "checkpointing with offload (no GPU here: same memory)",
    "checkpoint-hidden-offload": "checkpointing, each layer's input offloaded alone",
    "checkpoint-every-4": "checkpointing, every 4th layer",
    "reversible-b4": "**reversible, 4 side bits**",
    "reversible-b2": "reversible, 2 side bits",
    "reversible-b4-offload": "**reversible, 4 side bits, offloaded**",
    "reversible-b2-offload": "reversible, 2 side bits, offloaded",
}


def pages() -> list[Path]:
    """Return every page of the project that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "kernels").rglob("*.md"))]


def generated(text: str) -> str:
    """Return a page with its tables written anew; raise KeyError if it names a table that does not exist."""
    return _BLOCK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def training() -> str:
    """Tabulate what arms of training keep, and how long their steps take."""
    head = ("", "kept by the layers", "of checkpointing", "step, s", "of checkpointing (quartiles)",
            "loss before training")  # fmt: skip
    rows = []
    for record in records("training_smollm2_bf16"):
        low, high = record["step_ratio_quartiles"]
        rows.append((
            _ARMS[record["arm"]], f"{record['live_bytes'] / 1e6:.2f} MB", f"{record['live_ratio']:.3f}",
            f"{record['step_seconds']:.2f}", f"{record['step_ratio']:.2f} ({low:.2f}–{high:.2f})",
            f"{record['loss']:.3f}",
        ))  # fmt: skip
    return table(head, rows)


def training_bytes() -> str:
    """Tabulate what arms of training keep on the device, and in host memory."""
    head = ("", "kept by the layers on the device", "of checkpointing", "in host memory")
    rows = [
        (
            _ARMS[record["arm"]].partition(" (")[0],
            f"{record['live_bytes'] / 1e6:.2f} MB",
            f"{record['live_ratio']:.3f}",
            f"{record['live_host_bytes'] / 1e6:.2f} MB",
        )
        for record in records("training_bytes_smollm2_bf16")
    ]
    return table(head, rows)


def recall_arms() -> str:
    """Tabulate recall by direction and core."""
    head = ("direction, core of 30 layers", "exact", "loss, nats a token", "perplexity of another book, of base")
    rows = [
        (
            f"{record['arm']}, {record['core'][0]}–{record['core'][1]}",
            f"{record['exact']} of {record['total']}",
            f"{record['expand_loss']:.3f}",
            f"{record['perplexity_ratio']:.3f}",
        )
        for record in sorted(records("recall_arms_smollm2"), key=lambda record: _ORDER.index(record["arm"]))
    ]
    return table(head, rows)


_ORDER = ("reversed", "inverse", "reversed, the inverse's core", "forward", "reversed, all layers")


def recall_controls() -> str:
    """Tabulate what comes back when contexts are asked for wrongly."""
    head = ("what is asked", "exact", "nothing", "half of it like")
    rows = []
    for name, where in (("pages", "one adapter"), ("shelf_asked", "a shelf")):
        for r in records(f"recall_{name}_smollm2"):
            if "control" in r:
                counts = (f"{r[count]} of {r['queries']}" for count in ("exact", "empty", "similar_0.5"))
                rows.append((f"{where}: {r['control']}", *counts))
    return table(head, rows)


def recall_shelf() -> str:
    """Tabulate what is remembered on a shelf, beside as many pages in one adapter."""
    head = ("pages", "exact", "steps", "minutes", "perplexity of another book, of base", "adapters, MB")
    one = records("recall_pages_smollm2")[0]
    rows = [(
        f"{one['documents']} in one adapter", f"{one['exact']} of {one['total']}", str(one["steps"]),
        f"{one['seconds'] / 60:.0f}", f"{one['perplexity_ratio']:.3f}", "–",
    )]  # fmt: skip
    shelf = [*records("recall_shelf_smollm2"), *records("recall_shelf_added_smollm2")]
    pages = [record for record in shelf if "document" in record]
    for record in shelf:
        if record.get("asked") == "all":
            some = pages[: record["documents"]]
            ratios = [page["perplexity_ratio"] for page in some]
            rows.append((
                f"**{len(some)} on a shelf**", f"{record['exact']} of {record['total']}",
                str(sum(page["steps"] for page in some)), f"{sum(page['seconds'] for page in some) / 60:.0f}",
                f"1 (each one's adapter on: {sum(ratios) / len(ratios):.3f}, {max(ratios):.3f} at most)",
                f"{sum(page['bytes'] for page in some) / 1e6:.0f}",
            ))  # fmt: skip
    return table(head, rows)


def expand() -> str:
    """Tabulate what comes back from memories."""
    head = ("documents, placement", "read from", "exact", "edit distance", "more than from its own (95 % CI)")
    rows = []
    names = {"seen": "seen", "unseen": "unseen, learned", "unseen_matched": "unseen, matched",
             "unseen_matched_8": "unseen, matched, 8 slots", "help_tokens": "help, learned",
             "help_matched": "help, matched"}  # fmt: skip
    for name, what in names.items():
        for record in records(f"expand_{name}_smollm2"):
            more = record.get("more_than_own")
            low, high = more["ci95"] if more else (None, None)
            rows.append((
                f"{what}, {record['placement']}", record["control"], f"{record['exact']} of {record['rows']}",
                f"{record['edit_distance']:.3f}",
                f"{more['mean']:.3f} ({low:.3f} to {high:.3f})" if more else "–",
            ))  # fmt: skip
    return table(head, rows)


def history() -> str:
    """Tabulate memory and time of training through long histories."""
    head = ("segments", "tokens", "peak, MB", "seconds a token", "of the rival's")
    rows = []
    for record in records("history_smollm2"):
        if "segments" not in record:
            continue
        ratio = "–"
        if "time_ratio" in record:
            ratio = f"{record['time_ratio']:.2f} ({'–'.join(f'{q:.2f}' for q in record['time_ratio_quartiles'])})"
        rows.append((
            str(record["segments"]), str(record["tokens"]), f"{record['peak_bytes'] / 1e6:.0f}",
            f"{record['seconds_per_token']:.5f}", ratio,
        ))  # fmt: skip
    return table(head, rows)


def memory_worth() -> str:
    """Tabulate what a memory is worth to a language model."""
    head = ("a segment is read behind", "nats a token", "share of the gap that is closed (95 % CI)")
    measured = records("memory_ppl_smollm2")
    nats, shares = _nats(measured), _shares(measured)
    rows = [
        ("nothing", nats["none"], "–"),
        ("the last 32 tokens before it", nats["tail"], "0"),
        ("these, and the memory of the segment before it", nats["memory"], shares["closed"]),
        (
            "these, and the memory of a segment of another book",
            nats["shuffled"],
            shares["closed by a foreign memory"],
        ),
        (
            "these, and the memory of the third segment before it",
            nats["memory_of_third"],
            shares["closed by the memory of the third segment before"],
        ),
        ("the whole segment before it", nats["full"], "1"),
    ]
    return table(head, rows)


def memory_adapters() -> str:
    """Tabulate what memories of several adapters are worth."""
    head = ("memory", "nats a token behind it", "closed", "closed by a foreign memory",
            "nats won over the tail of that adapter")  # fmt: skip
    files = {
        "64 tokens, as above": "memory_ppl_smollm2",
        "64 tokens, 400 steps more, taught by the text too": "memory_ppl_taught_by_text_smollm2",
        "16 tokens, 800 steps": "memory_ppl_16_smollm2",
    }
    tail = _values(records(files["16 tokens, 800 steps"]))
    rows = []
    for what, name in files.items():
        measured = records(name)
        shares, behind = _shares(measured), _values(measured)["memory"]
        won = next((interval(r) for r in measured if "of that model" in r.get("difference", "")), None)
        won = won or f"{tail['tail, trained without memory'] - behind:.3f}"
        rows.append((what, f"{behind:.4f}", shares["closed"], shares["closed by a foreign memory"], won))
    return table(head, rows)


def ablation() -> str:
    """Tabulate what each part of the method is worth."""
    head = ("instead of the default", "page from its query", "page from its memory", "query from the memory")
    measures = ("expand_nats", "cycle_nats", "compress_nats")
    rows = [
        (record["arm"], *(interval(record[name]) if name in record else "–" for name in measures))
        for record in records("ablation_smollm2")
        if "minus" in record
    ]
    return table(head, rows)


def attention_cpu() -> str:
    """Tabulate attention's times on a CPU."""
    head = ("case", "ours, ms", "reference", "sdpa with copy", "copy")
    cases: dict[tuple, dict[str, dict]] = {}
    for record in records("attention_cpu"):
        cases.setdefault((record["passed"], record["tokens"], record["memory"]), {})[record["arm"]] = record
    rows = []
    for (passed, tokens, memory), arms in cases.items():
        others = (f"{arms[name]['ratio']:.2f} ×" if name in arms else "–" for name in ("reference", "sdpa", "copy"))
        ours = f"{arms['r3mem']['milliseconds']:.2f} ({arms['r3mem']['runs']})"
        rows.append((f"{passed}, T = {tokens}, M = {memory}", ours, *others))
    return table(head, rows)


def attention_logits() -> str:
    """Tabulate how far logits are from eager's and from float64's."""
    head = ("setting", "attention", "from eager", "from float64", "batch of 4 from batches of one")
    rows = [
        (
            record["setting"],
            record["attention"],
            f"{record['max_from_eager']:.1e}",
            f"{record['max_from_float64']:.1e}" if "max_from_float64" in record else "–",
            f"{record['batch_from_one']:.1e}",
        )
        for record in records("logits_smollm2")
    ]
    return table(head, rows)


def cli() -> str:
    """Tabulate the options of every command, read from its parser; versions of Python lay out its own text apart."""
    parts = []
    for name, what, command in _commands(parser(), "r3mem"):
        positional = " ".join(a.metavar or a.dest for a in command._actions if not a.option_strings)
        rows = [
            (f"`{_option(action)}`", (action.help % {"default": action.default}).replace("|", "\\|"))
            for action in command._actions
            if action.dest != "help"
        ]
        parts.append(f"## {name} {positional}".rstrip() + f"\n\n{_sentence(what)}\n\n" + table(
            ("argument", "meaning (default)"), rows
        ))  # fmt: skip
    return "\n\n".join(parts)


def _commands(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """Yield name, help and parser of each command; a command that has commands of its own is those."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps: dict[str, Any] = {choice.dest: choice.help for choice in action._choices_actions}
            for verb, command in action.choices.items():
                inner = list(_commands(command, f"{name} {verb}"))
                yield from inner or [(f"{name} {verb}", helps[verb], command)]


def _option(action: argparse.Action) -> str:
    """Return an option as it is written on the command line."""
    names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    if action.nargs == 0 or not action.option_strings:
        return names
    choices = "/".join(map(str, action.choices)) if action.choices else action.dest.upper()
    return f"{names} {action.metavar or choices}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _settings(kind: type) -> str:
    """Return the settings of a class, by group, with their defaults and options."""
    rows = []
    for name, (field, about) in settings_of(kind).items():
        option = "" if about.option is None else f"`--{about.option}`"
        choices = "" if about.choices is None else f" ({', '.join(map(str, about.choices))})"
        cells = (about.group, f"`{name}`", f"{default_text(field, about)}{choices}", option, about.help)
        rows.append(tuple(cell.replace("|", "\\|") for cell in cells))
    return table(("group", "setting", "default", "option", "what it does"), rows)


def families() -> str:
    """Return the table of what families of models can do."""
    found = list(records("families"))
    checks = list(next(record["results"] for record in found if record["refused"] is None))
    shown = [check for check in checks if check != "base"]  # which all have that can be given LoRA
    counts = [sum(record["results"].get(check) == "yes" for record in found) for check in shown]
    whole = sum(all(record["results"].get(check) == "yes" for check in checks) for record in found)
    rows = [(f"**all {len(found)}**", *(f"**{count}**" for count in counts), f"everything: **{whole}**")]
    for record in found:
        cells = ("yes" if record["results"].get(check) == "yes" else "–" for check in shown)
        rows.append((f"`{record['family']}`", *cells, _why_not(record)))
    return table(("family", *shown, "why not"), rows)


def _why_not(record: dict) -> str:
    """Return what a family's checks found instead of "yes", each reason once, behind the checks that found it."""
    if record["refused"] is not None:
        return f"not tried: {_reason(record['refused'])}"
    checks: dict[str, list[str]] = {}
    for check, result in record["results"].items():
        if result != "yes" and not result.startswith("see "):
            checks.setdefault(_reason(result), []).append(check)
    return "; ".join(f"*{', '.join(found)}*: {reason}" for reason, found in checks.items())


def _reason(result: str) -> str:
    """Return a reason without the error's class, and without what to do instead."""
    return re.sub(r"^\w+(Error|Exception): ", "", result).split(";")[0].replace("|", "/")


TABLES = {
    "families": families,
    **coupling_tables.TABLES,
    **inference_tables.TABLES,
    **kernel_tables.TABLES,
    **memory_tables.TABLES,
    **trained_tables.TABLES,
    **store_tables.TABLES,
    "cli": cli,
    "r3mem_config": lambda: _settings(R3MemConfig),
    "remember_settings": lambda: _settings(RememberSettings),
    "train_settings": lambda: _settings(TrainSettings),
    "refine_settings": lambda: _settings(RefineSettings),
    "training": training,
    "training_bytes": training_bytes,
    "recall_arms": recall_arms,
    "recall_controls": recall_controls,
    "recall_shelf": recall_shelf,
    "expand": expand,
    "history": history,
    "memory_worth": memory_worth,
    "memory_adapters": memory_adapters,
    "ablation": ablation,
    "attention_cpu": attention_cpu,
    "attention_logits": attention_logits,
}


def _values(measured: list[dict]) -> dict[str, float]:
    """Return nats a token by arm."""
    return {r["arm"]: r["nats_per_token"] for r in measured if "arm" in r and "of_chains" not in r}


def _nats(measured: list[dict]) -> dict[str, str]:
    return {arm: f"{value:.4f}" for arm, value in _values(measured).items()}


def _shares(measured: list[dict]) -> dict[str, str]:
    """Return the shares of the gap that memories close, by their names."""
    return {r["share"]: interval(r) for r in measured if r.get("gap_of") == "the same model"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write all tables anew; with --check only say which pages would change, and return 1 if one would."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page would change")
    options = parser.parse_args(arguments)
    changed = [page for page in pages() if generated(page.read_text(encoding="utf-8")) != page.read_text("utf-8")]
    for page in changed:
        print(page.relative_to(ROOT))
        if not options.check:
            page.write_text(generated(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
