"""The figures in the READMEs are those of the committed result files."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")


def records(name):
    lines = [json.loads(line) for line in (ROOT / "bench" / "results" / name).read_text().splitlines()]
    assert {"date", "commit", "torch"} <= set(lines[0]["environment"])
    return lines[1:]


def rows(path, columns):
    """Cells of the table rows of a Markdown file that have this many columns."""
    lines = [line for line in (ROOT / path).read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if len(row) == columns and "---" not in row]


def test_the_training_table():
    found = rows("README.md", 6)[1:]
    measured = records("training_smollm2_bf16.jsonl")
    assert len(found) == len(measured) == 6
    for (_, live, live_ratio, seconds, ratio, loss), record in zip(found, measured, strict=True):
        low, high = record["step_ratio_quartiles"]
        assert live == f"{record['live_bytes'] / 1e6:.2f} MB" and live_ratio == f"{record['live_ratio']:.3f}"
        assert seconds == f"{record['step_seconds']:.2f}" and loss == f"{record['loss']:.3f}"
        assert ratio == f"{record['step_ratio']:.2f} ({low:.2f}–{high:.2f})"


def test_the_slope():
    slopes = {record["arm"]: record for record in records("depth_smollm2_bf16.jsonl") if "bytes_per_layer" in record}
    reversible = slopes["reversible-b4"]
    assert (reversible["side_bytes_per_layer"], reversible["checksum_bytes_per_layer"]) == (147_456, 288)
    assert reversible["bytes_per_layer"] == [147_456 + 288] * 2
    assert "147,456 bytes" in (ROOT / "README.md").read_text()


def test_the_table_of_kernels():
    found = rows("kernels/coupling/README.md", 7)[1:]
    traffic = [record for record in records("traffic.jsonl") if record["dtype"] == "bfloat16"]
    gate = {
        (record["kernel"], record["bits"], record["target"]): record
        for record in records("compile_gate.jsonl")
        if record["dtype"] == "bfloat16"
    }
    assert len(found) == len(traffic) == len(gate) / 4 == 19
    for (name, bits, least, moved, eager, registers, shared), record in zip(found, traffic, strict=True):
        compiled = [gate[record["kernel"], record["bits"], target] for target in TARGETS]
        assert name == f"`{record['kernel']}`" and bits == ("–" if record["bits"] is None else str(record["bits"]))
        assert least == f"{record['least_bytes_per_element']:.2f}" and moved == f"{record['ratio']:.4f}"
        assert eager == f"{record['eager_ratio']:.2f}"
        assert registers == " / ".join(str(variant["registers"]) for variant in compiled)
        assert shared == str(max(variant["shared_bytes"] for variant in compiled))


def test_the_tables_of_attention():
    found = rows("kernels/attention/README.md", 7)[1:]
    traffic = {(r["kernel"], r["head_dim"]): r for r in records("traffic_attention.jsonl")}
    compiled = [*records("compile_gate_attention.jsonl"), *records("compile_gate_attention_layouts.jsonl")]
    assert f"of the {len(compiled)} variants" in " ".join((ROOT / "kernels/attention/README.md").read_text().split())
    gate = {(r["kernel"], r["head_dim"], r["target"]): r for r in compiled if r["dtype"] == "bfloat16"}
    assert len(found) == len(gate) / 4 and max(r["ratio"] for r in traffic.values()) <= 1.001
    for name, head_dim, over_least, of_once, registers, shared, matrix in found:
        key = f"attention_{name.strip('`')}", int(head_dim)
        variants = [gate[(*key, target)] for target in TARGETS]
        moved = traffic.get(key)
        assert over_least == ("–" if moved is None else f"{moved['ratio']:.4f}")
        assert of_once == ("–" if moved is None else f"{moved['once_ratio']:.2f}")
        assert registers == " / ".join(str(r["registers"]) for r in variants)
        assert shared == " / ".join(f"{r['shared_bytes'] / 1024:.0f}" for r in variants)
        assert matrix == " / ".join(r["matrix"] or "–" for r in variants)
    spilled = [r for r in compiled if r["spills"]]
    listed = [row for row in rows("kernels/attention/README.md", 5) if row[-1].isdigit()]
    wanted = [
        [f"`{r['kernel'].removeprefix('attention_')}`", str(r["head_dim"]), r["dtype"], r["target"], str(r["spills"])]
        for r in spilled
    ]
    assert listed == wanted


def test_attention_on_a_cpu():
    found = rows("kernels/attention/README.md", 5)
    cases = {}
    for record in records("attention_cpu.jsonl"):
        cases.setdefault((record["passed"], record["tokens"], record["memory"]), {})[record["arm"]] = record
    for (passed, tokens, memory), arms in cases.items():
        others = [f"{arms[n]['ratio']:.2f} ×" if n in arms else "–" for n in ("reference", "sdpa", "copy")]
        ours = f"{arms['r3mem']['milliseconds']:.2f} ({arms['r3mem']['runs']})"
        assert [f"{passed}, T = {tokens}, M = {memory}", ours, *others] in found
        # What the dispatcher goes by.
        assert passed == "decode" or arms["reference"]["ratio"] > 1
    for record in records("logits_smollm2.jsonl"):
        exact = f"{record['max_from_float64']:.1e}" if "max_from_float64" in record else "–"
        assert [
            record["setting"],
            record["attention"],
            f"{record['max_from_eager']:.1e}",
            exact,
            f"{record['batch_from_one']:.1e}",
        ] in found


def test_what_no_kernel_does():
    """No spills, 16-byte accesses, nothing fused: of all kernels, targets and dtypes."""
    compiled = records("compile_gate.jsonl")
    assert {record["target"] for record in compiled} == set(TARGETS)
    assert all(r["spills"] == r["fused"] == 0 and r["vector_bytes"] == 16 for r in compiled)
    assert max(record["ratio"] for record in records("traffic.jsonl")) <= 1.001


def test_every_file_that_is_named_exists():
    for path in ("README.md", "kernels/attention/README.md", "kernels/coupling/README.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / path).read_text()):
            assert ((ROOT / path).parent / link).exists(), f"{path} names {link}"


def test_what_is_recalled():
    found = rows("README.md", 4)
    arms, (pages, *controls) = records("recall_arms_smollm2.jsonl"), records("recall_pages_smollm2.jsonl")
    for record in arms:
        name = f"{record['arm']}, {record['core'][0]}–{record['core'][1]}"
        exact, loss, ratio = (
            f"{record['exact']} of {record['total']}",
            f"{record['expand_loss']:.3f}",
            f"{record['perplexity_ratio']:.3f}",
        )
        assert [name, exact, loss, ratio] in found
    for record in controls:
        counts = [str(record[count]) for count in ("exact", "empty", "similar_0.5")]
        assert [record["control"], *counts] in found
    assert f"gave {pages['exact']} of {pages['total']} contexts exactly" in (ROOT / "README.md").read_text()
    text = " ".join((ROOT / "README.md").read_text().split())
    pages = records("recall_page_smollm2.jsonl")
    assert len({record["seed"] for record in pages}) == len(pages) == 2
    for record in [*pages, *records("recall_three_smollm2.jsonl")]:
        assert record["exact"] == record["total"]
        for figure in (
            f"all {record['total']} contexts",
            f"{record['perplexity_ratio']:.3f} ×",
            f"{record['steps']} steps",
        ):
            assert figure in text
    for record in pages:
        assert f"{record['steps']} steps and {record['seconds']:.0f} s" in text
    adapters = records("recall_adapters_smollm2.jsonl")
    for one, expand, compress in (adapters[:3], adapters[3:]):
        assert one["seed"] == expand["seed"] == compress["seed"]
        assert f"{one['expand_loss']:.3f} against {expand['expand_loss']:.3f}" in text
        assert f"{one['compress_loss']:.3f} against {compress['compress_loss']:.3f}" in text


def test_what_memories_do():
    text = " ".join((ROOT / "README.md").read_text().split())
    found = records("memory_smollm2.jsonl")
    parts = [record for record in found if record["suite"] == "stream"]
    whole = parts[0]
    assert parts[-1]["bit_for_bit"]
    assert (
        f"{whole['tokens']:,} tokens of a book in {whole['segments']} segments: a memory of {whole['memory_bytes']:,} "
        f"bytes, {whole['tokens_per_second']:.0f} tokens a second" in text
    )
    assert f"from {whole['resident_mb'][0]:.1f} MB after the first tenth to {whole['resident_mb'][-1]:.1f} MB" in text
    batch = [record for record in found if record["suite"] == "batch"]
    ours, base = (
        max(r["max_abs_difference"] for r in batch if bool(r.get("base_model_without_memory")) is plain)
        for plain in (False, True)
    )
    assert all(record["same_argmax"] for record in batch if "same_argmax" in record)
    assert (
        f"differ by at most {ours:.4f} from those of the row alone" in text and f"{base:.5f} in the base model" in text
    )
    times, corrupted = [record for record in found if record["suite"] == "file"]
    assert f"{corrupted['refused']:,} of {corrupted['corruptions']:,} damaged or foreign files were refused" in text
    assert f"{times['file_bytes'] / 1e6:.1f} MB is loaded and checked in {times['load_ms']:.1f} ms" in text


def test_what_comes_back_from_memories():
    found = rows("README.md", 5)
    for name in ("seen", "unseen"):
        for record in records(f"expand_{name}_smollm2.jsonl"):
            low, high = record.get("more_than_own", {}).get("ci95", (None, None))
            assert [
                f"{name}, {record['placement']}",
                record["control"],
                f"{record['exact']} of {record['rows']}",
                f"{record['edit_distance']:.3f}",
                "–" if low is None else f"{record['more_than_own']['mean']:.3f} ({low:.3f} to {high:.3f})",
            ] in found


def interval(record):
    return f"{record['mean']:.3f} ({record['low']:.3f} to {record['high']:.3f})"


def test_what_a_memory_is_worth():
    text = " ".join((ROOT / "README.md").read_text().split())
    found, measured = rows("README.md", 3), records("memory_ppl_smollm2.jsonl")
    assert f"{measured[0]['segments']} segments of the held-out tenths" in text
    nats = {r["arm"]: f"{r['nats_per_token']:.4f}" for r in measured if "arm" in r and "of_chains" not in r}
    chains = {r["arm"]: f"{r['nats_per_token']:.4f}" for r in measured if r.get("of_chains")}
    shares = {(r["share"], r.get("gap_of")): interval(r) for r in measured if "share" in r}
    cells = {tuple(row[1:]) for row in found}
    same = "the same model"
    for arm, share in (
        ("memory", "closed"),
        ("shuffled", "closed by a foreign memory"),
        ("memory_of_third", "closed by the memory of the third segment before"),
    ):
        assert (nats[arm], shares[share, same]) in cells
    assert {(nats["none"], "–"), (nats["tail"], "0"), (nats["full"], "1")} <= cells
    other = "a model trained equally without memory"
    assert shares["closed", other] in text
    assert f"{chains['memory_of_7']} against {chains['memory']} nats" in text and chains["full_of_7"] in text
    assert interval(next(r for r in measured if "difference" in r)) in text
    for arm in ("tail", "full"):
        assert nats[f"{arm}, trained without memory"] in text
    before = records("memory_ppl_500_steps_smollm2.jsonl")
    assert interval(next(r for r in before if r.get("share") == "closed by a foreign memory")) in text


def test_memories_trained_otherwise():
    text = " ".join((ROOT / "README.md").read_text().split())
    found = rows("README.md", 5)
    first, more, few = (records(f"memory_ppl_{name}smollm2.jsonl") for name in ("", "taught_by_text_", "16_"))

    def nats(measured):
        return {r["arm"]: r["nats_per_token"] for r in measured if "arm" in r and "of_chains" not in r}

    without = {arm: nats(more)[f"{arm}, trained without memory"] for arm in ("tail", "full")}
    assert all(without[arm] == nats(few)[f"{arm}, trained without memory"] and f"{without[arm]:.4f}" in text
               for arm in without)  # fmt: skip
    for measured in (first, more, few):
        behind = nats(measured)["memory"]
        closed, foreign = (
            interval(next(r for r in measured if r.get("share") == share and r["gap_of"] == "the same model"))
            for share in ("closed", "closed by a foreign memory")
        )
        won = next((interval(r) for r in measured if "of that model" in r.get("difference", "")), None)
        won = won or f"{without['tail'] - behind:.3f}"
        assert [f"{behind:.4f}", closed, foreign, won] in [row[1:] for row in found]
        assert without["tail"] < behind
    assert f"a memory is {few[0]['memory_bytes']:,} bytes" in text


def test_what_training_through_histories_costs():
    found = rows("README.md", 5)
    *counts, compared = records("history_smollm2.jsonl")
    for record in counts:
        ratio = "–"
        if "time_ratio" in record:
            ratio = f"{record['time_ratio']:.2f} ({'–'.join(f'{q:.2f}' for q in record['time_ratio_quartiles'])})"
        peak, seconds = f"{record['peak_bytes'] / 1e6:.0f}", f"{record['seconds_per_token']:.5f}"
        assert [str(record["segments"]), str(record["tokens"]), peak, seconds, ratio] in found
    many, few = compared["segments_compared"]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"The peak of {many} segments is {compared['peak_ratio']:.3f} × that of {few}" in text


def test_what_the_parts_are_worth():
    found = rows("README.md", 4)
    differences = [record for record in records("ablation_smollm2.jsonl") if "minus" in record]
    assert len(differences) == 5
    for record in differences:
        values = [interval(record[name]) for name in ("expand_nats", "cycle_nats", "compress_nats")]
        assert [record["arm"], *values] in found
