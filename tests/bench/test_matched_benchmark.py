"""`bench.matched`: its arms and shares, on a tiny model."""

import json

from bench import matched


def test_arms_and_shares(folder, tmp_path):
    """What nothing is left out of is the whole segment: 12 slots for the 12 tokens before a tail of 4."""
    texts = []
    for index in range(2):
        texts.append(tmp_path / f"{index}.txt")
        texts[-1].write_text("".join(chr(40 + (index * 7 + i * i) % 50) for i in range(600)))
    output = tmp_path / "out.jsonl"
    settings = {"segments": 6, "chains": 2, "batch": 4, "budget": 16, "length": 16, "tail": 4}
    settings |= {"dtype": "float32"}
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    arguments += ["--slots", "3", "12", "--text", *map(str, texts), "--model", str(folder), "--output", str(output)]
    assert matched.main(arguments) == 0
    head, *found = [json.loads(line) for line in output.read_text().splitlines()][1:]
    assert (head["segments"], head["chains"], head["texts"]) == (6, 2, 2)
    arms = {r["arm"]: r["nats_per_token"] for r in found if "arm" in r and "places" not in r}
    kinds = {f"{kind}_{slots}" for kind in ("raw", "even", "attended", "matched", "foreign") for slots in (3, 12)}
    assert set(arms) == {"tail", "full", "foreign", *kinds}
    for arm in ("raw_12", "even_12", "attended_12", "matched_12"):
        assert abs(arms[arm] - arms["full"]) < 2e-3, arm
    closed = {(r["closed_by"], r["of"]): r for r in found if "closed_by" in r}
    assert all(r["low"] <= r["mean"] <= r["high"] for r in closed.values())
    assert ("matched_16_of_7", "full_of_7") in closed and ("raw_16_of_7", "full_of_7") in closed
    better = {(r["nats_better_than"], r["slots"]) for r in found if "nats_better_than" in r}
    singles = {(rival, slots) for rival in ("raw", "even", "attended") for slots in (3, 12)}
    assert better == {*singles, ("raw", 16)}
