"""Draws the documentation's figures from the result files: `python -m bench.figures` writes them anew."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from bench.tables import ROOT, records

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


def main() -> None:
    """Write all figures."""
    matplotlib.rcParams["svg.hashsalt"] = "r3mem_fast"  # so that the file is the same every time
    training(ROOT / "docs" / "assets" / "training.svg")


if __name__ == "__main__":
    main()
