"""The documentation's tables of kernels: what compilers make of them, and the bytes that they move."""

from collections.abc import Iterable

from .markdown import records, table

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")


def coupling_kernels() -> str:
    """Tabulate traffic and resources of the coupling kernels."""
    head = ("kernel / variant", "side bits", "least", "moved", "eager", "registers", "shared, bytes")
    gate = {(r["kernel"], r["bits"], r["target"]): r for r in records("compile_gate") if r["dtype"] == "bfloat16"}
    rows = []
    for record in records("traffic"):
        if record["dtype"] != "bfloat16":
            continue
        compiled = [gate[record["kernel"], record["bits"], target] for target in TARGETS]
        rows.append((
            f"`{record['kernel']}`", _or_dash(record["bits"]), f"{record['least_bytes_per_element']:.2f}",
            f"{record['ratio']:.4f}", f"{record['eager_ratio']:.2f}",
            " / ".join(str(variant["registers"]) for variant in compiled),
            str(max(variant["shared_bytes"] for variant in compiled)),
        ))  # fmt: skip
    return table(head, rows)


def attention_kernels() -> str:
    """Tabulate traffic and resources of the attention kernels."""
    head = ("kernel / variant", "head_dim", "moved over least", "of once", "registers", "shared, KiB",
            "matrix products", "loop")  # fmt: skip
    traffic = {(r["kernel"], r["head_dim"]): r for r in records("traffic_attention")}
    variants: dict[tuple[str, int], dict[str, dict]] = {}
    for record in records("compile_gate_attention"):
        if record["dtype"] == "bfloat16" and "warps" not in record:  # those have a table of their own
            variants.setdefault((record["kernel"], record["head_dim"]), {})[record["target"]] = record
    rows = []
    for (kernel, head_dim), found in sorted(variants.items(), key=_place):
        compiled, moved = [found[target] for target in TARGETS], traffic.get((kernel, head_dim))
        rows.append((
            f"`{kernel.removeprefix('attention_')}`", str(head_dim),
            "–" if moved is None else f"{moved['ratio']:.4f}", "–" if moved is None else f"{moved['once_ratio']:.2f}",
            " / ".join(str(r["registers"]) for r in compiled),
            " / ".join(f"{r['shared_bytes'] / 1024:.0f}" for r in compiled),
            " / ".join(r["matrix"] or "–" for r in compiled),
            " / ".join(str(r["loop"] or "–") for r in compiled if "loop" in r),
        ))  # fmt: skip
    return table(head, rows)


def _place(item: tuple[tuple[str, int], dict]) -> tuple[int, int, int]:
    """Return the sorting key of a kernel: operation, variant, head_dim."""
    (kernel, head_dim), _ = item
    name, _, variant = kernel.removeprefix("attention_").partition("/")
    names = ("forward", "query", "key", "memory", "delta", "decode", "combine")
    return names.index(name), ("plain", "many", "once", "all", "packed", "alone", "short").index(variant), head_dim


def attention_specialised() -> str:
    """Tabulate resources of the forward pass whose warps share out the work, by both versions of the compiler."""
    head = ("variant", "head_dim", "target", "registers", "spills", "warps, of asked", "shared, KiB", "loop",
            "setmaxnreg", "copies by descriptor")  # fmt: skip
    variants: dict[tuple[str, int, str], list[dict]] = {}
    for name in ("compile_gate_attention", "compile_gate_attention_triton36"):
        for record in records(name):
            if "warps" in record and record["dtype"] == "bfloat16":
                place = record["kernel"].partition("/")[2], record["head_dim"], record["target"]
                variants.setdefault(place, []).append(record)
    rows = []
    for (variant, head_dim, target), found in variants.items():
        rows.append((
            f"`{variant}`", str(head_dim), target,
            *(_both(str(r[name]) for r in found) for name in ("registers", "spills")),
            _both(f"{r['warps']} of {r['warps_asked']}" for r in found),
            _both(f"{r['shared_bytes'] / 1024:.0f}" for r in found),
            *(_both(str(r[name]) for r in found) for name in ("loop", "setmaxnreg", "tma")),
        ))  # fmt: skip
    return table(head, rows)


def _both(values: Iterable[str]) -> str:
    """Return the values of two versions, or one if they are equal."""
    return " / ".join(dict.fromkeys(values))


def attention_spills() -> str:
    """Tabulate the attention kernels that spill registers."""
    return _spills(records("compile_gate_attention"))


def attention_spills_3_6() -> str:
    """Tabulate the attention kernels that spill more by Triton 3.6.0 than by the version that is used."""
    used = {_variant(record): record["spills"] for record in records("compile_gate_attention")}
    return _spills([r for r in records("compile_gate_attention_triton36") if r["spills"] > used[_variant(r)]])


def _variant(record: dict) -> tuple:
    return tuple(record[name] for name in ("kernel", "head_dim", "dtype", "target"))


def _spills(found: list[dict]) -> str:
    head = ("kernel", "head_dim", "dtype", "target", "spills")
    rows = [
        (f"`{r['kernel'].removeprefix('attention_')}`", str(r["head_dim"]), r["dtype"], r["target"], str(r["spills"]))
        for r in found
        if r["spills"]
    ]
    return table(head, rows)


def _or_dash(value: object) -> str:
    return "–" if value is None else str(value)


TABLES = {
    "coupling_kernels": coupling_kernels,
    "attention_kernels": attention_kernels,
    "attention_specialised": attention_specialised,
    "attention_spills": attention_spills,
    "attention_spills_3_6": attention_spills_3_6,
}
