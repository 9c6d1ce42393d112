"""Benchmarks of training through histories, on tiny models: that they measure what they say."""

import json

import pytest

from bench import ablation, history, memory_ppl
from r3mem_fast import R3MemConfig, R3MemPipeline


def records(path):
    environment, *found = [json.loads(line) for line in path.read_text().splitlines()]
    assert {"date", "commit", "torch"} <= set(environment["environment"])
    return found


def test_history(folder, tmp_path):
    """Peaks of processes of their own, times of paired steps, and of a long history no rival."""
    output = tmp_path / "out.jsonl"
    options = ["--model", str(folder), "--memory-tokens", "2", "--segment-length", "8", "--rounds", "2"]
    assert history.main(["--segments", "2,4", "--rival-segments", "2", *options, "--output", str(output)]) == 0
    two, four, compared = records(output)
    assert (two["segments"], two["tokens"], four["segments"], four["tokens"]) == (2, 16, 4, 32)
    for record in (two, four):
        assert record["peak_bytes"] > 1e8 and record["seconds_per_token"] > 0
    assert two["checkpointed_seconds_per_token"] > 0 and len(two["time_ratio_quartiles"]) == 2
    assert 0 < two["kept_bytes"] < 1e6
    assert "time_ratio" not in four and "kept_bytes" not in four
    assert compared["peak_ratio"] == round(four["peak_bytes"] / two["peak_bytes"], 4)


def test_memory_ppl(folder, tmp_path):
    """Every arm and share, of an adapter that nothing was learned by: its foreign memory is worth what its own is."""
    config = R3MemConfig(core=(1, 3), num_memory_tokens=2, segment_length=8, segment_overlap=3)
    R3MemPipeline(str(folder), config=config).save(tmp_path / "adapter")
    R3MemPipeline(str(folder), config=R3MemConfig(core=(1, 3), segment_length=8)).save(tmp_path / "plain")
    texts = []
    for index in range(2):
        texts.append(tmp_path / f"{index}.txt")
        texts[-1].write_text("".join(chr(40 + (index * 7 + i * i) % 50) for i in range(1200)))
    output = tmp_path / "out.jsonl"
    arguments = ["--adapter", str(tmp_path / "adapter"), "--plain", str(tmp_path / "plain"), "--segments", "6",
                 "--chains", "2", "--batch", "4", "--text", *map(str, texts), "--output", str(output)]  # fmt: skip
    assert memory_ppl.main(arguments) == 0
    head, *found = records(output)
    assert (head["segments"], head["chains"], head["texts"]) == (6, 2, 2) and head["memory_bytes"] > 0
    arms = {
        record["arm"]: record["nats_per_token"] for record in found if "arm" in record and "of_chains" not in record
    }
    assert set(arms) == {"tail", "none", "full", "memory", "shuffled", "memory_of_third"} | {
        f"{arm}, trained without memory" for arm in ("tail", "none", "full")
    }
    # Untrained adapters change nothing, so both are the base model.
    assert all(arms[arm] == arms[f"{arm}, trained without memory"] for arm in ("tail", "none", "full"))
    chains = {record["arm"] for record in found if record.get("of_chains")}
    assert chains == {"tail", "full_of_7", "memory", "memory_of_7"}
    closed = {(r["share"], r.get("gap_of")): r for r in found if "share" in r}
    assert len(closed) == 7 and all(r["low"] <= r["mean"] <= r["high"] for r in closed.values())
    own = closed["closed", "the same model"]
    assert own["mean"] == pytest.approx((arms["tail"] - arms["memory"]) / (arms["tail"] - arms["full"]), rel=0.05)
    more, won = (r for r in found if "difference" in r)
    assert "seven segments" in more["difference"] and "of that model" in won["difference"]
    assert won["mean"] == pytest.approx(arms["tail, trained without memory"] - arms["memory"], abs=2e-4)
    texts[0].write_text("short")
    with pytest.raises(ValueError, match="have 0 segments with 7 before them; 2 are needed"):
        memory_ppl.main([*arguments[:10], "--text", str(texts[0])])


def test_ablation(folder, tmp_path):
    """Arms at equal steps, and their differences to the default, paired by seed."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"We saw him at {10 + i % 90} on the day {100 + i} of it again." for i in range(400)))
    output = tmp_path / "out.jsonl"
    arms = ["default", "document level alone", "without momentum"]
    options = ["--model", str(folder), "--tokens", "40", "--memory-tokens", "2", "--steps", "2", "--seeds", "2"]
    assert ablation.main(["--arm", *arms, "--text", str(text), *options, "--output", str(output)]) == 0
    found = records(output)
    runs, differences = found[:6], found[6:]
    assert [(record["arm"], record["seed"]) for record in runs] == [(arm, seed) for arm in arms for seed in (0, 1)]
    assert all(record["steps"] == 2 for record in runs)
    assert runs[2]["contexts"] == 1 < runs[0]["contexts"]
    assert [record["arm"] for record in differences] == arms[1:]
    for record in differences:
        of = [r["expand_nats"] for r in runs if r["arm"] == record["arm"]]
        default = [r["expand_nats"] for r in runs[:2]]
        mean = sum(a - b for a, b in zip(of, default, strict=True)) / 2
        assert record["expand_nats"]["mean"] == pytest.approx(mean, abs=1e-3)
        assert record["expand_nats"]["low"] <= mean <= record["expand_nats"]["high"]


def test_ablation_of_a_matched_memory(folder, tmp_path):
    """Forward nothing learns of it; and the same command goes on where it was interrupted."""
    text, output = tmp_path / "text.txt", tmp_path / "out.jsonl"
    text.write_text("\n\n".join(f"I do so as he is in {10 + i % 90} or {100 + i}." for i in range(400)))
    sizes = ["--tokens", "30", "--memory-tokens", "2", "--steps", "1", "--seeds", "2", "--output", str(output)]
    command = ["--arm", "default", "matched memory", "--model", str(folder), "--text", str(text), *sizes]
    with pytest.MonkeyPatch.context() as patch:
        learned, done = ablation._learned, []

        def interrupted(*arguments, **settings):
            if len(done) == 3:
                raise KeyboardInterrupt
            done.append(arguments)
            return learned(*arguments, **settings)

        patch.setattr(ablation, "_learned", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ablation.main(command)
        before = records(output)
        patch.setattr(
            ablation, "_learned", lambda *arguments, **settings: done.append(0) or learned(*arguments, **settings)
        )
        assert ablation.main(command) == 0
    found = records(output)
    assert len(done) == 4 and found[:3] == before and not output.with_name("out.jsonl.unfinished").exists()
    assert ["compress_nats" in record for record in found] == [True, True, False, False, False]
