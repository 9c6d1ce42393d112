"""The documentation: tables are made from the result files, figures in the text stand there, links lead somewhere."""

import json
import math
import re
from pathlib import Path

import pytest

from bench import kernel_tables, tables, trained_tables

ROOT = Path(__file__).parents[1]
PACKAGES = ("integrations", "memory", "memory/writers", "reversible")


def records(name):
    lines = [json.loads(line) for line in (ROOT / "bench" / "results" / name).read_text().splitlines()]
    assert {"date", "commit", "torch"} <= set(lines[0]["environment"])
    return lines[1:]


def text_of(*names):
    return " ".join(" ".join((ROOT / name).read_text().split()) for name in names)


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_generating_the_tables_changes_nothing(page):
    text = page.read_text(encoding="utf-8")
    assert tables.generated(text) == text, "run python -m bench.tables"
    assert text.count("<!-- table: ") == text.count("<!-- end -->")


def test_every_table_is_shown_and_is_what_its_name_says():
    shown = set(re.findall(r"<!-- table: (\w+) -->", "".join(page.read_text() for page in tables.pages())))
    assert shown == set(tables.TABLES)
    changed = tables.generated("<!-- table: training -->\n| 1 |\n<!-- end -->")
    assert "0.377" in changed and "| 1 |" not in changed
    with pytest.raises(KeyError):
        tables.generated("<!-- table: none -->\n<!-- end -->")


def test_links():
    for page in tables.pages():
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page} names {link}"


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_what_reversible_training_saves():
    measured = {record["arm"]: record for record in records("training_smollm2_bf16.jsonl")}
    reversible, text = measured["reversible-b4"], text_of("README.md")
    assert f"{reversible['live_ratio']:.3f} × the bytes of gradient checkpointing" in text
    assert f"at {reversible['step_ratio']:.2f} × its time" in text
    ratios = {r["bits"]: r["ratio"] for r in records("perplexity_smollm2.jsonl") if r["fraction_bits"] in (None, 14)}
    for page in ("README.md", "docs/reversible.md"):
        assert f"{ratios[4]:.4f} ×" in text_of(page) and f"{ratios[2]:.2f} ×" in text_of(page)
    slopes = {record["arm"]: record for record in records("depth_smollm2_bf16.jsonl") if "bytes_per_layer" in record}
    slope = slopes["reversible-b4"]
    assert (slope["side_bytes_per_layer"], slope["checksum_bytes_per_layer"]) == (147_456, 288)
    assert slope["bytes_per_layer"] == [147_456 + 288] * 2
    assert "147,456 bytes" in text_of("docs/reversible.md")


def test_what_no_kernel_does():
    """No spills, 16-byte accesses, nothing fused: of all kernels, targets and dtypes."""
    compiled = records("compile_gate.jsonl")
    assert {record["target"] for record in compiled} == set(kernel_tables.TARGETS)
    assert all(r["spills"] == r["fused"] == 0 and r["vector_bytes"] == 16 for r in compiled)
    assert max(record["ratio"] for record in records("traffic.jsonl")) <= 1.001
    assert max(record["ratio"] for record in records("traffic_attention.jsonl")) <= 1.001
    for name in ("compile_gate", "compile_gate_attention", "compile_gate_matching"):
        variants = [
            {(r["kernel"], r["target"], r["dtype"], r.get("bits", r.get("head_dim"))) for r in records(f"{name}{end}")}
            for end in (".jsonl", "_triton36.jsonl")
        ]
        assert variants[0] == variants[1]
    matching = [r for r in records("compile_gate_matching_triton36.jsonl") if r["spills"]]
    assert {(r["kernel"], r["dtype"], r["head_dim"]) for r in matching} == {("matching_cross/plain", "float32", 256)}
    spills = [str(r["spills"]) for r in matching]
    assert f"with {', '.join(spills[:-1])} and {spills[-1]} bytes" in text_of("kernels/matching/README.md")
    older = records("compile_gate_triton36.jsonl")
    assert all(r["fused"] == 0 and r["vector_bytes"] == 16 for r in older)
    (spilling,) = (r for r in older if r["spills"])
    place = [spilling[name] for name in ("kernel", "bits", "dtype", "target", "spills")]
    assert place == ["momentum_forward/first", None, "float32", "cuda:80", 8]
    specialised = [
        record
        for end in (".jsonl", "_triton36.jsonl")
        for record in records(f"compile_gate_attention{end}")
        if "warps" in record
    ]
    assert len(specialised) == 2 * 2 * 2 * 2 * 2
    assert all(not r["spills"] and r["warps"] > r["warps_asked"] and r["setmaxnreg"] and r["tma"] for r in specialised)
    attention = records("compile_gate_attention.jsonl")
    assert f"of the {len(attention)} variants" in text_of("kernels/attention/README.md")


def test_what_the_dispatcher_goes_by():
    arms = [record for record in records("attention_cpu.jsonl") if record["arm"] == "reference"]
    assert arms and all(record["passed"] == "decode" or record["ratio"] > 1 for record in arms)


def test_what_is_recalled():
    pages = records("recall_pages_smollm2.jsonl")[0]
    text, short = text_of("docs/recall.md"), text_of("README.md")
    assert f"gave {pages['exact']} of {pages['total']} contexts exactly" in text
    assert f"in one adapter {pages['exact']} do" in short
    shelf = [record for record in records("recall_shelf_smollm2.jsonl") if "document" in record]
    total, steps = sum(record["total"] for record in shelf), sorted(record["steps"] for record in shelf)
    (asked,) = [
        r for r in records("recall_shelf_added_smollm2.jsonl") if (r.get("asked"), r["documents"]) == ("all", 20)
    ]
    assert total == pages["total"] == asked["total"] == asked["exact"] == sum(record["exact"] for record in shelf)
    assert f"all {total} contexts come back if each page has an adapter" in short
    assert f"all {total} contexts come back from the shelf" in text
    assert f"One page took {steps[-1]} steps" in text and f"the others {steps[0]} to {steps[-2]}" in text
    asked_again = records("recall_shelf_asked_smollm2.jsonl")
    (every,) = [r for r in asked_again if (r.get("asked"), r["documents"]) == ("all", 24)]
    assert f"all {every['exact']} of {every['total']} contexts of the 24 pages" in text
    (swapped,) = [r for r in asked_again if r.get("control") == "entities swapped"]
    others = swapped["queries"] - swapped["empty"] - swapped["exact"]
    said = (
        f"of {swapped['queries']} queries with other pages' names in them {swapped['exact']} gave their context back"
    )
    assert f"{said} and {others} another text" in text
    first = [r for r in asked_again if r.get("asked") == "the first page"]
    assert len(first) == 4 and all(record["exact"] == record["total"] == 7 for record in first)
    ten = records("recall_shelf_ten_smollm2.jsonl")
    first = [r for r in ten if r.get("asked") == "the first page"]
    assert len(first) == 10 and all(record["exact"] == record["total"] == 7 for record in first)
    (every,) = [r for r in ten if (r.get("asked"), r["documents"]) == ("all", 11)]
    assert every["exact"] == every["total"] and f"all {every['total']} contexts of the eleven" in text
    swapped, halves, unseen = (r for r in ten if "control" in r)
    assert f"there {swapped['exact']} of {swapped['queries']} queries with other pages' names" in text
    assert f"{halves['exact']} of {halves['queries']} half queries" in text
    assert f"{unseen['queries'] - unseen['empty']} of {unseen['queries']} queries of unseen pages some text" in text
    assert f"{shelf[0]['bytes'] / 1e6:.1f} MB" in text and f"{shelf[0]['bytes'] / 1e6:.1f} MB" in short
    assert f"{pages['perplexity_ratio']:.2f} ×" in short
    single = records("recall_page_smollm2.jsonl")
    assert len({record["seed"] for record in single}) == len(single) == 2
    for record in [*single, *records("recall_three_smollm2.jsonl")]:
        assert record["exact"] == record["total"]
        for figure in (
            f"all {record['total']} contexts",
            f"{record['perplexity_ratio']:.3f} ×",
            f"{record['steps']} steps",
        ):
            assert figure in text
    for record in single:
        assert f"{record['steps']} steps and {record['seconds']:.0f} s" in text
    first = single[0]
    assert f"all {first['total']} contexts exact after {first['steps']} steps and {first['seconds']:.0f} s" in short
    assert f"{first['perplexity_ratio']:.3f} ×" in short
    adapters = records("recall_adapters_smollm2.jsonl")
    for one, expand, compress in (adapters[:3], adapters[3:]):
        assert one["seed"] == expand["seed"] == compress["seed"]
        assert f"{one['expand_loss']:.3f} against {expand['expand_loss']:.3f}" in text
        assert f"{one['compress_loss']:.3f} against {compress['compress_loss']:.3f}" in text


def test_memories_behind_an_adapter_of_the_text():
    text = text_of("docs/memory.md")
    nats = {
        r["arm"]: r["nats_per_token"] for r in records("text_adapter_novels_smollm2.jsonl") if "nats_per_token" in r
    }
    assert f"by {nats['tail'] - nats['matched_64']:.3f} nats a token better than without" in text
    assert f"within {nats['matched_64'] - nats['full']:.3f} of what" in text
    assert nats["foreign_64"] > nats["tail"]


def test_anchors_behind_seven_segments():
    text = text_of("docs/memory.md")
    for name in ("anchored_adaptive_chains", "packaged_chains", "packaged_chains_once"):
        (better,) = [
            r
            for r in records(f"{name}_smollm2.jsonl")
            if r.get("nats_better_than") == "adaptive" and r["arm"].startswith("anchored")
        ]
        assert f"by {better['mean']:.3f} ({better['low']:.3f} to {better['high']:.3f})" in text


def test_what_the_parts_are_worth():
    text, found = text_of("docs/histories.md"), records("ablation_smollm2.jsonl")
    default = [r for r in found if r.get("arm") == "default"]
    means = {
        name: sum(r[name] for r in default) / len(default) for name in default[0] if name.endswith(("nats", "tokens"))
    }
    assert len(default) == 10 and f"A page of about {means['context_tokens']:.0f} tokens" in text
    assert f"{means['expand_nats']:.3f} nats a token from its query, {means['cycle_nats']:.3f} from its memory" in text
    assert f"and {means['compress_nats']:.3f} of the query" in text
    recalled = {
        arm: sum(r.get("recalled", 0) for r in found if r["arm"] == arm) for arm in ("default", "document level alone")
    }
    assert recalled == {"default": 0, "document level alone": 7} and "7 of 10 pages are recalled" in text


def test_what_refining_buys():
    """Answers gain from what asks for the text, and what follows is read worse for it: the page says both."""
    found, text = records("refine_answers_smollm2.jsonl"), text_of("docs/memory.md")
    gained = {record["gained_by"]: record["mean"] for record in found if record.get("of") == "nats"}
    better = {(r["arm"], r["nats_better_than"]): r for r in found if "nats_better_than" in r}
    (step,) = (record["mean"] for record in found if record.get("seconds_of") == "step")
    refined = better["adaptive+16", "adaptive_16"]
    assert refined["low"] > 0
    said = f"Sixteen steps bring {gained['adaptive_16']:.3f} to {gained['adaptive+16']:.3f}"
    assert f"{said}, by {interval(refined)} nats a token of an answer; a step took {step:.1f} s" in text
    assert f"leave the memory where it was, {gained['adaptive+16 other']:.3f}" in text
    _, *found = records("refine_novels_smollm2.jsonl")
    better = {(r["arm"], r["nats_better_than"]): r for r in found if "nats_better_than" in r}
    asked = better["adaptive_16+16 asked", "adaptive_16"]
    assert asked["high"] < 0
    assert f"by {-asked['mean']:.3f} ({-asked['high']:.3f} to {-asked['low']:.3f}) nats a token" in text
    both = better["adaptive_16+16", "adaptive_16"]
    assert both["low"] < 0 < both["high"]  # as the page says


def test_what_comes_back_of_unseen_text():
    learned, matched = (
        next(r for r in records(f"expand_{name}_smollm2.jsonl") if r.get("control") == "own memory")
        for name in ("unseen", "unseen_matched")
    )
    distances = f"an edit distance of {matched['edit_distance']:.3f} beside {learned['edit_distance']:.3f}"
    text = text_of("docs/memory.md")
    assert f"{distances}, and {matched['exact']} of {matched['rows']} windows exactly" in text
    fewer = next(r for r in records("expand_unseen_matched_8_smollm2.jsonl") if r["control"] == "own memory")
    assert (fewer["writer"], fewer["memory_tokens"], fewer["steps"]) == ("matched", 8, matched["steps"])
    said = f"From half as many slots, 8, the edit distance is {fewer['edit_distance']:.3f}"
    assert f"{said}, and {fewer['exact']} of {fewer['rows']} windows are exact" in text


def test_what_memories_do():
    text = text_of("docs/memory.md")
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


def interval(record):
    return f"{record['mean']:.3f} ({record['low']:.3f} to {record['high']:.3f})"


def values(measured, chains=False):
    chosen = [record for record in measured if "arm" in record and bool(record.get("of_chains")) == chains]
    return {record["arm"]: f"{record['nats_per_token']:.4f}" for record in chosen}


def test_what_a_memory_is_worth():
    text, measured = text_of("docs/histories.md"), records("memory_ppl_smollm2.jsonl")
    assert f"{measured[0]['segments']} segments of the held-out tenths" in text
    nats, chains = values(measured), values(measured, chains=True)
    shares = {(r["share"], r.get("gap_of")): r for r in measured if "share" in r}
    closed = shares["closed", "the same model"]
    assert f"closes {closed['mean']:.3f} of the gap" in text_of("docs/memory.md")
    assert interval(shares["closed", "a model trained equally without memory"]) in text
    assert f"{chains['memory_of_7']} against {chains['memory']} nats" in text and chains["full_of_7"] in text
    assert interval(next(r for r in measured if "difference" in r)) in text
    for arm in ("tail", "full"):
        assert nats[f"{arm}, trained without memory"] in text
    before = records("memory_ppl_500_steps_smollm2.jsonl")
    assert interval(next(r for r in before if r.get("share") == "closed by a foreign memory")) in text


def test_what_a_matched_memory_is_worth_to_a_second_model():
    """It is ahead of every rival, barely of one, and closes less than on the first model."""
    found, first = (records(f"matched_novels_{model}.jsonl") for model in ("gemma3_270m", "smollm2"))
    better = {(r["nats_better_than"], r["slots"]): r for r in found if "nats_better_than" in r}
    assert {slots for _, slots in better} == {16, 64} and all(r["low"] > 0 for r in better.values())
    text = text_of("docs/memory.md")
    assert f"their own values, by {interval(better['attended', 16])} nats a token" in text
    gemma, smollm2 = (
        [next(r["mean"] for r in of if r.get("closed_by") == f"matched_{slots}") for slots in (64, 16)]
        for of in (found, first)
    )
    assert f"{gemma[0]:.3f} of the gap in 64 slots and {gemma[1]:.3f} in 16, there" in text
    assert f"there {smollm2[0]:.3f} and {smollm2[1]:.3f}" in text


def test_what_shared_slots_are_worth():
    """At a quarter all of a paragraph, as far as can be told; the match counts where slots are few."""
    found = records("answers_adaptive_xquad_smollm2.jsonl")
    gained = {(r["gained_by"], r["of"]): r for r in found if "gained_by" in r}
    better = {(r["ratio"], k, r[k]): r for r in found if "arm" in r for k in r if k.endswith("_better_than")}
    memory, short = text_of("docs/memory.md"), text_of("README.md")
    quarter, eighth = (gained[f"adaptive_{ratio}", "nats"] for ratio in (4, 8))
    assert f'(`memory_allocation="adaptive"`) {quarter["mean"]:.3f}, an eighth' in short
    assert f"an eighth {eighth['mean']:.3f} (the most" in short
    assert f"in place of {interval(gained['matched_4', 'nats'])} of it with" in memory
    assert better[4, "nats_better_than", "attended_adaptive"]["low"] < 0
    assert f"({interval(better[4, 'nats_better_than', 'attended_adaptive'])} nats a token of the answer)" in memory
    kvzip = better[4, "f1_better_than", "kvzip_adaptive"]
    assert f"better in F1, by {-kvzip['mean']:.3f} ({-kvzip['high']:.3f} to {-kvzip['low']:.3f})" in memory
    assert f"at a sixteenth {interval(better[16, 'nats_better_than', 'attended_adaptive'])} nats over" in memory
    assert f"and {interval(better[16, 'nats_better_than', 'kvzip_adaptive'])} over KVzip" in memory
    novels = records("adaptive_novels_smollm2.jsonl")
    eight = next(r for r in novels if r.get("arm") == "adaptive_8" and r.get("nats_better_than") == "matched")
    assert f"it is better by {interval(eight)} nats a token" in memory


def test_what_memories_of_conversations_are_worth():
    head, *found = records("agent_smollm2.jsonl")
    better = {(r["way"], r["better_than"]): r for r in found if r.get("of") == "nats"}
    nats = {r["way"]: r["nats"] for r in found if "nats" in r}
    text = text_of("docs/conversations.md")
    assert f"MemoryBank's {head['users']} users" in text and f"{head['questions']} questions" in text
    for slots in (64, 16):
        assert all(better[f"memory_{slots}", rival]["low"] > 0 for rival in ("last", "attended", "expected"))
        assert all(better[f"memory_{slots}", rival]["high"] < 0 for rival in ("bm25", "minilm"))
        assert all(nats[f"{way}_{slots}"] < nats["full"] for way in ("bm25", "minilm"))
    for way in ("bm25", "minilm"):
        same = better[f"memory+{way}_64", way]
        assert same["low"] < 0 < same["mean"] and better[f"memory+{way}_16", way]["high"] < 0
        assert abs(nats[f"{way}_64"] - nats[f"{way}_16"]) < 0.03 * (nats["nothing"] - nats[f"{way}_16"])
    bm25, minilm = (nats[f"{way}_16"] - nats[f"{way}_64"] for way in ("bm25", "minilm"))
    assert f"more turns add next to nothing, {bm25:.3f} nats a token by BM25 and {minilm:.3f} by MiniLM" in text
    assert better["memory+minilm_64", "bm25"]["low"] > 0
    times, shared = records("store_times_smollm2.jsonl"), records("store_times_adaptive_smollm2.jsonl")
    add = next(r for r in times if "turn" in r)
    sizes = {r["of"]: r["mean"] for r in times if "of" in r}
    first = next(r for r in shared if r.get("first_token") == "memory")["over_prefill"]["mean"]  # in a new store
    short = text_of("README.md")
    assert f"the first token comes in {first:.3f} of" in short
    assert 0.5 < add["most_milliseconds"] / 1e3 < 1 and sizes["words"] < 1e-3
    assert f"a file of {sizes['memory_bytes'] / 1e6:.0f} MB" in text
    assert f"would be {sizes['cache_bytes'] / 1e6:.0f} MB, and its text {sizes['text_bytes'] / 1e3:.0f} kB" in text


def test_what_memories_of_conversations_are_worth_where_heads_share_slots():
    head, *found = records("agent_adaptive_smollm2.jsonl")
    better = {(r["way"].removesuffix("_64"), r["better_than"]): r for r in found if r.get("of") == "nats"}
    shares = {r["way"]: r["share"] for r in found if "share" in r}
    kept, learned = shares["memory_64"], shares["anchored_64"]
    assert kept["low"] < 1 < kept["high"] and learned["low"] > 1
    said = f"({kept['mean']:.3f} of it, {kept['low']:.3f} to {kept['high']:.3f}; {head['users']} users)"
    assert said in text_of("README.md")
    text = text_of("docs/conversations.md")
    assert f"The same {head['questions']} questions of the {head['users']} users" in text
    assert f"the match adds {interval(better['memory', 'attended'])} nats a token" in text
    assert f"is worth more, {interval(learned)} of it: {interval(better['anchored', 'memory'])} nats a token" in text
    assert f"and {interval(better['memory+found', 'memory'])} nats a token better than the memory alone" in text
    assert f"they alone are worth {interval(better['memory+found', 'found'])} less" in text
    slots = {r["way"]: r["slots"] for r in found if "way" in r and "slots" in r}
    assert f"are {slots['found_64']:.0f} tokens more" in text
    assert slots["memory+found_64"] - slots["memory_64"] == pytest.approx(slots["found_64"], abs=0.2)
    for way in ("bm25", "minilm"):
        assert better[f"memory+{way}", way]["low"] > 0 and better["memory", way]["high"] < 0
    assert better["memory", "last"]["low"] > 0


def test_what_is_written_behind_memories_of_conversations():
    head, history, *found = records("agent_written_smollm2.jsonl")
    ways = {r["way"]: r for r in found if "better_than" not in r}
    grades = [record["f1"] for record in ways.values()]
    text = text_of("docs/conversations.md")
    said = f"The {head['questions']} questions of the first {head['users']} users, answered greedily in at most"
    assert f"{said} {head['new_tokens']} tokens" in text and max(history["full_cut_tokens"]) > 0
    assert f"F1 is {min(grades):.3f} to {max(grades):.3f} whatever" in text
    assert f"{ways['nothing']['f1']:.3f} where nothing does" in text
    assert not any(record["contains"] for record in ways.values())
    assert ways["nothing"]["nats"] - ways["memory_64"]["nats"] > math.log(2)
    assert ways["nothing"]["nats"] - ways["memory+bm25_64"]["nats"] > math.log(5)


def test_what_memories_of_conversations_are_worth_to_a_second_model():
    better, share = {}, {}
    for name in ("agent_gemma3_270m", "agent_gemma3_270m_16"):
        head, *found = records(f"{name}.jsonl")
        better |= {(r["way"], r["better_than"]): r for r in found if r.get("of") == "nats"}
        share |= {r["way"]: r["share"] for r in found if "share" in r}
    text = text_of("docs/conversations.md")
    assert f"the first {head['users']} of these users, {head['questions']} questions" in text
    assert f"nearly what the whole conversation is, {interval(share['memory_64'])}" in text
    ours, last = interval(share["memory_16"]), interval(share["last_16"])
    assert f"worth {ours} of it**, where as many last tokens are worth {last}" in text
    assert f"the match adds {interval(better['memory_16', 'attended'])} nats a token to the most attended" in text
    alone, turns = better["memory+found_16", "memory"], better["memory+found_16", "found"]
    assert f"with 16 slots {interval(alone)} nats a token better than the memory alone, and {interval(turns)}" in text
    beside, few = better["memory+bm25_64", "bm25"], better["memory+bm25_16", "bm25"]
    assert beside["low"] > 0 and few["low"] < 0 < few["high"]
    assert f"by BM25 {interval(beside)} nats a token, and with 16 {interval(few)}, which" in text
    said = (
        f"on Gemma 3 270M, most of whose layers see 512 keys, one a seventh as long {share['memory_16']['mean']:.3f},"
    )
    slots, tokens = (
        next(r[name] for r in found if r.get("way", "memory_16") == "memory_16" and name in r)
        for name in ("slots", "history_tokens")
    )
    assert said in text_of("README.md") and round(tokens / slots) == 7
    for slots in (64, 16):
        assert better[f"memory_{slots}", "last"]["low"] > 0
        assert all(better[f"memory_{slots}", way]["high"] < 0 for way in ("bm25", "minilm"))
        assert all(better[f"memory+found_{slots}", way]["low"] > 0 for way in ("memory", "found"))
    assert better["memory_16", "attended"]["low"] > 0
    assert better["memory+minilm_64", "minilm"]["mean"] > 0


def test_what_memories_of_meetings_are_worth():
    head, *found = records("agent_qmsum_smollm2.jsonl")
    better = {r["better_than"]: r for r in found if r.get("way") == "memory_64" and r.get("of") == "nats"}
    share = {r["way"]: r["share"] for r in found if "share" in r}
    slots = {r["way"]: r["slots"] for r in found if "slots" in r}
    text = text_of("docs/conversations.md")
    assert f"{head['users']} meetings, {head['questions']} queries" in text
    length = f"in {slots['memory_64']:,.0f} of {slots['full']:,.0f} slots"
    assert f"{interval(share['memory_64'])} of the whole meeting {length}" in text
    assert (
        f"{interval(better['bm25'])} nats a token better than BM25's, {interval(better['last'])} than the last" in text
    )
    assert f"beside MiniLM's the interval holds 0, {interval(better['minilm'])}" in text
    assert f"The match adds {interval(better['attended'])} to the most attended" in text
    assert f"Half of what it gives, {interval(share['foreign_64'])}, another meeting's" in text
    assert better["minilm"]["low"] < 0 < min(better[rival]["low"] for rival in ("bm25", "last", "attended"))


def test_what_memories_are_worth_behind_a_lookup():
    head, *found = records("rag_smollm2.jsonl")
    better = {(r["way"], r["better_than"], r["of"]): r for r in found if "better_than" in r}
    share = {r["way"]: r["share"]["mean"] for r in found if "share" in r}
    text = text_of("docs/documents.md")
    assert f"each of {head['questions']} of XQuAD's {head['paragraphs']} paragraphs" in text
    assert f"for {head['found_first']['bm25']:.3f} of the questions" in text
    assert f"MiniLM's is for {head['found_first']['minilm']:.3f}" in text
    for slots in (48, 96):
        for way in ("memory", "memory+bm25", "memory+minilm"):
            assert all(better[f"{way}_{slots}", rival, "nats"]["low"] > 0 for rival in ("bm25", "minilm", "expected"))
        assert better[f"memory_{slots}", "attended", "nats"]["low"] > 0
        kvzip = better[f"memory_{slots}", "kvzip", "nats"]
        assert kvzip["low"] < 0 < kvzip["high"]
        assert share[f"memories_{slots}"] < share[f"memory_{slots}"] and share[f"foreign_{slots}"] < 0
    for way in ("memory", "memory+bm25", "memory+minilm"):
        sentence = better[f"{way}_48", "bm25+", "nats"]
        assert sentence["low"] < 0 < sentence["high"]
    assert better["memory_48", "bm25+", "f1"]["high"] < 0
    assert (
        better["memory+minilm_96", "minilm+", "nats"]["low"] > 0 > better["memory+minilm_96", "bm25+", "nats"]["low"]
    )


def test_what_anchors_are_worth_behind_a_lookup():
    head, *found = records("rag_anchored_smollm2.jsonl")
    better = {(r["way"], r["better_than"]): r for r in found if r.get("of") == "nats"}
    alone, beside = better["anchored_48", "memory"], better["anchored+minilm_48", "memory+minilm"]
    worse = f"{-alone['mean']:.3f} ({-alone['high']:.3f} to {-alone['low']:.3f})"
    text = text_of("docs/documents.md")
    assert f"{head['questions']} of these questions in 48 slots" in text
    assert f"are answered {worse} nats a token worse" in text and alone["high"] < 0
    assert f"by MiniLM as well, {interval(beside)}." in text and beside["low"] < 0 < beside["high"]


def test_what_recalling_is_worth_before_a_question():
    head, *found = records("recalled_smollm2.jsonl")
    ways = {r["way"]: r for r in found if "better_than" not in r}
    better = {(r["way"], r["better_than"]): r for r in found if "better_than" in r}
    text = text_of("docs/documents.md")
    assert f"{head['exact']} of {head['contexts']} contexts come back" in text and head["exact"] == head["contexts"]
    assert f"all {head['questions']} questions about these paragraphs" in text
    assert f"{ways['recalled']['found']:.3f} of the questions give a text" in text
    assert f"on average is worth {interval(ways['by_query']['share'])} of the paragraph" in text
    assert f"whole document's query {interval(ways['by_document']['share'])}" in text
    assert f"its sentence is worth {interval(ways['bm25+']['share'])}" in text
    assert f"is {head['bytes_of_text']} bytes, its adapter {head['bytes_a_paragraph'] / 1e6:.1f} MB and" in text
    assert f"{head['seconds_a_paragraph']:.0f} seconds of training on one core" in text
    assert ways["bm25"]["share"]["mean"] == 1 and ways["another"]["share"]["high"] < 0.1
    assert better["by_document", "another"]["low"] > 0 > better["by_document", "bm25"]["high"]


def test_what_a_matched_memory_is_worth():
    head, *found = records("matched_novels_smollm2.jsonl")
    closed = {(r["closed_by"], r["of"]): r for r in found if "closed_by" in r}
    better = {(r["nats_better_than"], r["slots"], r.get("of")): r for r in found if "nats_better_than" in r}
    short, text = text_of("README.md"), text_of("docs/memory.md")
    assert f"({head['segments']} segments, 95 %)" in short
    answered = records("answers_xquad_smollm2.jsonl")
    answers = {(r["gained_by"], r["of"]): r for r in answered if "gained_by" in r}
    matched, attended = (answers[f"{arm}_4", "nats"]["mean"] for arm in ("matched", "attended"))
    assert f"a quarter of its size keeps {matched:.3f}, the most attended keys {attended:.3f}" in short
    quarter = [r for r in answered if r.get("ratio") == 4]
    for record in (
        next(r for r in quarter if r.get("nats_better_than") == "attended"),
        next(r for r in quarter if r.get("f1_better_than") == "attended"),
        better["attended", 64, None],
        better["attended", 16, None],
        better["learned", 64, None],
        closed["learned_tail", "full"],
    ):
        assert interval(record) in text
    for name, arms in (
        ("matched_forget_smollm2.jsonl", ["matched_152_of_7", "raw_152_of_7"]),
        ("matched_rematch_smollm2.jsonl", ["matched_152_of_7"]),
        ("matched_forget_256_smollm2.jsonl", ["matched_256_of_7", "raw_256_of_7"]),
        ("matched_rematch_256_smollm2.jsonl", ["matched_256_of_7"]),
    ):
        _, *found = records(name)
        for arm in arms:
            seven = next(r for r in found if r.get("closed_by") == arm)
            assert f"{seven['mean']:.2f} ({seven['low']:.2f} to {seven['high']:.2f})" in text
    head, *found = records("matched_rematch_smollm2.jsonl")
    assert f"the same {head['chains']} places" in text and f"over {head['long_chains']} places" in text
    assert interval(next(r for r in found if r.get("of") == 64)) in text
    assert interval(next(r for r in found if r.get("nats_better_than") == "raw")) in text


def test_what_memories_are_worth_behind_a_lookup_where_heads_share_slots():
    """On the questions of the other run, where what has no slots is the same but for another processor's rounding."""
    others = records("rag_smollm2.jsonl")
    head, *found = records("rag_adaptive_smollm2.jsonl")
    assert head["questions"] == others[0]["questions"] and head["found_first"] == others[0]["found_first"]
    nats, its = ({r["way"]: r["nats"] for r in some if "nats" in r} for some in (found, others))
    for way in nats:
        if not way.startswith(("memor", "attended", "kvzip", "foreign")):
            assert nats[way] == pytest.approx(its[way], rel=3e-3, abs=0.01)
    better = {(r["way"], r["better_than"]): r for r in found if r.get("of") == "nats"}
    for rival in ("bm25", "minilm", "bm25+", "minilm+"):
        assert better["memory_48", rival]["low"] > 0
    assert better["memory+minilm_96", "minilm+"]["low"] > 0 > better["memory_96", "bm25+"]["low"]
    best = better["memory_48", "bm25+"]
    said = f"by {best['mean']:.3f} nats a token ({best['low']:.3f} to {best['high']:.3f})"
    assert said in text_of("README.md")
    for rival in ("attended", "kvzip"):
        assert better["memory_48", rival]["low"] < 0 < better["memory_48", rival]["high"]
    costs = better["memory+bm25_48", "memory"]
    said = f"({-costs['mean']:.3f} nats a token worse, {-costs['high']:.3f} to {-costs['low']:.3f})"
    assert costs["mean"] < 0 < costs["high"] and said in text_of("docs/documents.md")


def test_what_adapters_that_read_add():
    """The same segments in both runs, read by the same base model behind the same memories: the control."""
    runs = [records(f"{name}_novels_smollm2.jsonl") for name in ("adapted", "adapted_foreign")]
    nats = [{r["arm"]: r["nats_per_token"] for r in found if "nats_per_token" in r} for found in runs]
    assert all(nats[0][arm] == nats[1][arm] for arm in nats[0] if "adapted" not in arm)
    better, taught = ({(r["arm"], r["nats_better_than"]): r for r in run if "nats_better_than" in r} for run in runs)
    text = text_of("docs/memory.md")
    few, many = (better[f"adapted_{slots}", f"anchored_{slots}"] for slots in (16, 64))
    said = [f"{r['mean']:.3f} ({r['low']:.3f} to {r['high']:.3f})" for r in (few, many)]
    assert f"16 slots by {said[0]} nats a token, and behind 64 by {said[1]}" in text and few["low"] > 0 > many["low"]
    assert f"tokens alone, by {better['adapted_tail', 'tail']['mean']:.3f}" in text
    lost = [[-run[f"foreign_adapted_{n}", "adapted_tail"]["mean"] for n in (64, 16)] for run in (taught, better)]
    mine, others = ([f"{value:.3f}" for value in values] for values in lost)
    assert f"they lose {mine[0]} behind one of 64 slots and {mine[1]} behind one of 16" in text
    assert f"where the others lose {others[0]} and {others[1]}" in text
    assert all(taught[f"adapted_{slots}", f"anchored_{slots}"]["low"] < 0 for slots in (16, 64))


def test_what_training_from_the_match_adds():
    """Beside the matched memories of the same places, which are those of the other tables: the control."""
    head, *found = records("anchored_novels_smollm2.jsonl")
    closed, others = (
        {(r["closed_by"], r["of"]): r for r in some if "closed_by" in r}
        for some in (found, records("matched_novels_smollm2.jsonl"))
    )
    for slots in (64, 16):
        arm = (f"matched_{slots}", "full")
        assert closed[arm]["mean"] == pytest.approx(others[arm]["mean"], abs=1e-3)
    text = text_of("docs/memory.md")
    packaged = records("packaged_novels_smollm2.jsonl")[0]
    assert packaged["segments"] == records("matched_novels_smollm2.jsonl")[0]["segments"]  # those of one table
    _, *shared = records("anchored_adaptive_novels_smollm2.jsonl")
    both = {(r["closed_by"], r["of"]): r for r in shared if "closed_by" in r}
    alone = {(r["closed_by"], r["of"]): r for r in records("adaptive_novels_smollm2.jsonl") if "closed_by" in r}
    for slots in (64, 16, 8):  # layers of other widths are matched apart since, which rounds otherwise
        arm = (f"adaptive_{slots}", "full")
        assert both[arm]["mean"] == pytest.approx(alone[arm]["mean"], abs=0.01)
    for kind, words in {
        "novels": "{:.3f} of the {:.3f} nats a token that it gains on novels",
        "wikipedia": "{:.3f} of {:.3f} on Wikipedia",
        "dialogue": "{:.3f} of {:.3f} on chats",
        "help": "help ({:.3f} beside {:.3f})",
        "code": "code ({:.3f} beside {:.3f})",
    }.items():
        nats = {
            r["arm"]: r["nats_per_token"] for r in records(f"packaged_{kind}_smollm2.jsonl") if "nats_per_token" in r
        }
        gains = (nats[f"{before}adaptive_16"] - nats[f"{before}anchored_16"] for before in ("foreign_", ""))
        assert words.format(*gains) in text, kind
    assert f"the same {head['segments']} segments" in text


def test_the_packaged_adapter_is_worth_its_bytes():
    """Better than the closed form of as many slots on every kind of text: what it is packaged for."""
    for kind in trained_tables.PACKAGED_KINDS:
        found = records(f"packaged_{kind}_smollm2.jsonl")
        better = {r["arm"]: r["low"] for r in found if r.get("nats_better_than") == "adaptive" and "of" not in r}
        assert {"anchored_64", "anchored_16"} <= better.keys() and min(better.values()) > 0, kind
    answers = [r for r in records("packaged_answers_smollm2.jsonl") if r.get("nats_better_than") == "adaptive"]
    anchored = [r for r in answers if r["arm"].startswith("anchored")]
    assert len(anchored) == 3 and all(r["low"] < 0 < r["high"] for r in anchored)  # as the page says


def test_memories_trained_otherwise():
    """None reads these books as well as an adapter without memory: the page on memory says so too."""
    text = text_of("docs/histories.md")
    first, more, few = (records(f"memory_ppl_{name}smollm2.jsonl") for name in ("", "taught_by_text_", "16_"))
    without = values(more)
    for arm in ("tail", "full"):
        name = f"{arm}, trained without memory"
        assert without[name] == values(few)[name] and without[name] in text
    assert all(without["tail, trained without memory"] < values(found)["memory"] for found in (first, more, few))
    assert f"a memory is {few[0]['memory_bytes']:,} bytes" in text
    assert "without memory, trained on the same novels, reads them better" in text_of("docs/memory.md")


def test_what_training_through_histories_costs():
    *_, compared = records("history_smollm2.jsonl")
    many, few = compared["segments_compared"]
    text = text_of("docs/histories.md")
    assert f"The peak of {many} segments is {compared['peak_ratio']:.3f} × that of {few}" in text


def test_the_architecture_names_every_module():
    """Those of the package itself, and of its packages in which many work together."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = ROOT / "r3mem_fast"
    paths = [*package.glob("*.py"), *(path for name in PACKAGES for path in (package / name).glob("*.py"))]
    names = {path.stem for path in paths} - {"__init__", "__main__"}
    assert sorted(name for name in names if not re.search(rf"\b{name}\b", text)) == []


def test_what_a_killed_process_loses():
    *_, record = records("crash_smollm2.jsonl")
    assert record["problems"] == [] and record["kills"] == 200
    text = text_of("docs/conversations.md")
    assert f"killed 200 times: of {record['adds']} additions and {record['deletes']} deletions" in text
    assert f"{record['compared']} of {record['compared']} memories" in text
