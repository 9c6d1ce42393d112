"""What `bench.training` says of its measurements: medians, ratios over checkpointing, bytes a layer, and tables."""

import itertools
import statistics
from typing import Any

from .training_arms import BASELINE


def completed(records: dict[str, dict], seconds: dict[str, list[float]], arms: list[str]) -> list[dict[str, Any]]:
    """Add times and ratios to the records of the arms, from the rounds that have been run so far.

    Args:
        records: Records by arm, of the arms that have been measured so far; completed in place.
        seconds: Seconds of each round, by arm.
        arms: All arms.

    Returns:
        The records, in the order of `arms`.
    """
    for record in records.values():
        if "live_bytes" in record and "live_bytes" in records.get(BASELINE, {}):
            record["live_ratio"] = record["live_bytes"] / records[BASELINE]["live_bytes"]
    for arm, taken in seconds.items():
        if not taken:
            continue
        record = records[arm]
        record["runs"] = len(taken)
        record["step_seconds"], record["step_seconds_quartiles"] = _median(taken)
        if seconds.get(BASELINE):
            ratios = [own / other for own, other in zip(taken, seconds[BASELINE], strict=False)]
            record["step_ratio"], record["step_ratio_quartiles"] = _median(ratios)
    return [records[arm] for arm in arms if arm in records]


def _median(values: list[float]) -> tuple[float, list[float]]:
    """Return the median and the two quartiles."""
    if len(values) < 2:
        return values[0], [values[0], values[0]]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, [low, high]


def slopes(records: list[dict]) -> list[dict[str, Any]]:
    """Compare the records of several depths.

    Returns:
        One record an arm with `bytes_per_layer`, the slope of `live_bytes` between neighbouring depths, and for
        reversible arms what it should be the sum of.
    """
    found = []
    for arm in dict.fromkeys(record["arm"] for record in records):
        points = sorted((r["layers"], r["live_bytes"]) for r in records if r["arm"] == arm and "live_bytes" in r)
        pairs = list(itertools.pairwise(points))
        if not pairs:
            continue
        first = next(r for r in records if r["arm"] == arm and "live_bytes" in r)
        record = {
            "arm": arm,
            "depths": [layers for layers, _ in points],
            "bytes_per_layer": [_exact((b1 - b0) / (l1 - l0)) for (l0, b0), (l1, b1) in pairs],
        }
        for part in ("side_bytes_per_layer", "checksum_bytes_per_layer"):
            if part in first:
                record[part] = first[part]
        found.append(record)
    return found


def _exact(number: float) -> int | float:
    return int(number) if number == int(number) else number


def table(records: list[dict]) -> str:
    """Format records as text, with ratios over checkpointing; their notes stand below."""
    heads = (
        "arm",
        "layers",
        "live MB",
        "ratio",
        "host MB",
        "with head",
        "peak MB",
        "step s",
        "ratio",
        "quartiles",
        "loss",
    )
    rows: list[tuple[str, ...]] = [heads]
    for record in records:
        if "live_bytes" not in record:
            rows.append((record["arm"], *["-"] * (len(heads) - 1)))
            continue
        peak, quartiles = record.get("max_memory_bytes", record.get("peak_rss")), record.get("step_ratio_quartiles")
        rows.append(
            (
                record["arm"],
                str(record["layers"]),
                f"{record['live_bytes'] / 1e6:.2f}",
                f"{record['live_ratio']:.3f}" if "live_ratio" in record else "-",
                f"{record.get('live_host_bytes', 0) / 1e6:.2f}",
                f"{record['live_bytes_total'] / 1e6:.2f}",
                f"{peak / 1e6:.0f}" if peak is not None else "-",
                f"{record['step_seconds']:.3f}" if "step_seconds" in record else "-",
                f"{record['step_ratio']:.3f}" if "step_ratio" in record else "-",
                f"{quartiles[0]:.3f}–{quartiles[1]:.3f}" if quartiles is not None else "-",
                f"{record['loss']:.4f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        row[0].ljust(widths[0])
        + "".join(cell.rjust(width + 2) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    notes = dict.fromkeys(f"{record['arm']}: {record['note']}" for record in records if "note" in record)
    return "\n".join([*lines, *notes])


def slope_table(records: list[dict]) -> str:
    """Format the records of `slopes` as text."""
    return "\n".join(
        f"{r['arm']}: {', '.join(f'{slope:,}' for slope in r['bytes_per_layer'])} bytes a layer"
        + (
            f" (side bits {r['side_bytes_per_layer']:,}, checksums {r['checksum_bytes_per_layer']:,})"
            if "side_bytes_per_layer" in r
            else ""
        )
        for r in records
    )
