"""The documentation's tables of couplings: what they cost untrained, and what adapters learn under them."""

import math
import statistics
from typing import Any

from .markdown import records, table

_ARMS = {
    "checkpointing": "plain network, checkpointing",
    "seed-1": "the same, another seed",
    "momentum-8": "momentum, 8 side bits",
    "momentum-4": "momentum, 4 side bits",
    "momentum-2": "momentum, 2 side bits",
    "balanced-4": "momentum, balanced, 4 side bits",
    "balanced-2": "momentum, balanced, 2 side bits",
    "calibrated": "momentum, calibrated",
    "bdia-4": "BDIA, 4 side bits",
    "meft-8": "MEFT, 8 side bits",
    "meft-4": "MEFT, 4 side bits",
    "adapter-4": "momentum, 4 side bits, adapters between the streams in place of LoRA",
}
_PLAIN = "checkpointing"


def couplings() -> str:
    """Tabulate the perplexity of adapters trained under each coupling, over that of plain fine-tuning's."""
    found = {record["arm"]: record for record in records("finetuning_smollm2")}
    rows = []
    for arm, name in _ARMS.items():
        if arm in found:
            record = found[arm]
            plain = (
                [] if arm == "adapter-4" else [_ratio(record["plain"][t], found[_PLAIN]["plain"][t]) for t in _TEXTS]
            )
            trained = [_ratio(record["as_trained"][t], found[_PLAIN]["plain"][t]) for t in _TEXTS]
            rows.append((name, *(plain or ("–", "–")), *trained, f"{record['training_loss']:.4f}"))
    head = ("", "in the plain network: the book", "other text", "as trained: the book", "other text", "training loss")
    return table(head, rows)


_TEXTS = ("book", "other")


def _ratio(losses: list[float], plain: list[float]) -> str:
    """Format a ratio of perplexities, with its interval over windows."""
    differences = [a - b for a, b in zip(losses, plain, strict=True)]
    mean, half = statistics.fmean(differences), 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))
    if not any(differences):
        return "1"
    return f"{math.exp(mean):.3f} ({math.exp(mean - half):.3f}–{math.exp(mean + half):.3f})"


def calibration() -> str:
    """Tabulate the perplexity of untrained reversible networks over that of the plain one, by side bits."""
    found = records("calibration_smollm2")
    kinds = list(found[0]["ratios"])
    rows = [
        (record["choice"], f"{record['mean_bits']:.2f}", *(f"{record['ratios'][kind]:.3f}" for kind in kinds))
        for record in found
    ]
    return table(("side bits", "mean", *kinds), rows)


TABLES: dict[str, Any] = {"couplings": couplings, "calibration": calibration}
