"""Draws the documentation's figures from the result files: `python -m bench.figures` writes them anew."""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from .markdown import ROOT, records
from .memory_tables import matched_sizes

_NAMES = {
    "plain": "plain",
    "checkpoint-every-4": "checkpointing,\nevery 4th layer",
    "checkpoint": "checkpointing,\nevery layer",
    "reversible-b4": "reversible,\n4 side bits",
    "reversible-b2": "reversible,\n2 side bits",
}


def training(path: Path) -> None:
    """Draw what the decoder layers keep for the backward pass, and how long a step takes, for each way of training."""
    measured = {record["arm"]: record for record in records("training_smollm2_bf16")}
    found = [measured[arm] for arm in _NAMES]
    colours = ["#2a7f62" if record["arm"].startswith("reversible") else "#9aa5b1" for record in found]
    figure, axes = pyplot.subplots(1, 2, figsize=(9.5, 3.1), layout="constrained")
    for axis, key, scale, label, unit in (
        (axes[0], "live_bytes", 1e6, "kept by the layers for the backward pass, MB", "{:.1f} MB"),
        (axes[1], "step_ratio", 1, "time of a step, of checkpointing's", "{:.2f} ×"),
    ):
        values = [record[key] / scale for record in found]
        bars = axis.barh(list(_NAMES.values()), values, color=colours)
        axis.bar_label(bars, [unit.format(value) for value in values], padding=3, fontsize=8)
        axis.set_xlabel(label, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.invert_yaxis()
    axes[0].set_xscale("log")
    axes[0].set_xlim(1, 3000)
    axes[1].set_xlim(0, 1.35)
    axes[1].set_yticklabels([])
    figure.suptitle("SmolLM2-135M, LoRA, 512 tokens, bfloat16, two CPU cores", fontsize=10)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


_LINES = {
    "matched": ("matched, no training", "#2a7f62", "o-"),
    "attended": ("most attended keys, own values", "#5b8db8", "o-"),
    "expected": ("Expected Attention (kvpress)", "#b07aa1", "s--"),
    "snapkv": ("SnapKV (kvpress)", "#d98c5f", "s--"),
    "raw": ("raw tokens in their place", "#9aa5b1", "o-"),
    "keydiff": ("KeyDiff (kvpress)", "#c9b458", "s--"),
    "kvzip": ("KVzip (kvpress)", "#6b6ecf", "s--"),
    "even": ("evenly spaced keys", "#c2c8cf", "o-"),
    "foreign": ("matched, of another text", "#c0504d", "x:"),
}


def memory(path: Path) -> None:
    """Draw what memories of as many slots close of the gap between the last tokens and the whole segment before."""
    closed = matched_sizes()
    counts = sorted({int(key.split("_")[1]) for key, _ in closed if re.fullmatch(r"matched_\d+", key)})
    figure, axis = pyplot.subplots(figsize=(7.2, 3.8), layout="constrained")
    for arm, (name, colour, style) in _LINES.items():
        found = [(int(key[len(arm) + 1 :]), r) for (key, _), r in closed.items() if re.fullmatch(rf"{arm}_\d+", key)]
        if not found:
            continue
        slots, shares = zip(*sorted(found, key=lambda pair: pair[0]), strict=True)
        axis.plot(slots, [r["mean"] for r in shares], style, color=colour, label=name, markersize=4)
        axis.fill_between(slots, [r["low"] for r in shares], [r["high"] for r in shares], color=colour, alpha=0.1)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set_xlabel("slots for 224 tokens, in each layer and head", fontsize=9)
    axis.set_ylabel("share of the gap that is closed", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle("0: the last 32 tokens alone. 1: the whole segment before. SmolLM2-135M, novels", fontsize=10)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Write all figures."""
    matplotlib.rcParams["svg.hashsalt"] = "r3mem_fast"  # so that the file is the same every time
    training(ROOT / "docs" / "assets" / "training.svg")
    memory(ROOT / "docs" / "assets" / "memory.svg")


if __name__ == "__main__":
    main()
