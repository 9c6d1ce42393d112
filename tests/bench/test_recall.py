"""`bench.recall` on a tiny model: its pages, and that every suite and control runs and counts."""

import json
import pydoc_data.topics

import pytest

from bench.recall import main
from r3mem_fast import load_model
from r3mem_fast.data.text import pages_of

TEXT = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
CONTROLS = [
    "adapters off, backward",
    "adapters off, forward",
    "forward, adapters on",
    "entities swapped",
    "first half of the query",
    "queries of unseen pages",
]


def test_pages(folder):
    _, tokenizer = load_model(str(folder))
    pages = pages_of(TEXT, tokenizer, 5, tokens=300, offset=2)
    assert list(pages) == [f"page {n}" for n in range(2, 7)]
    assert all(300 <= len(tokenizer(page).input_ids) <= 361 for page in pages.values())
    assert list(pages_of(TEXT, tokenizer, 7, tokens=300).values())[2:] == list(pages.values())
    with pytest.raises(ValueError, match="pages of 300 tokens; 2 are needed"):
        pages_of("A short text of one paragraph that is no page of its own at all.", tokenizer, 2, tokens=300)


def test_every_suite(folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    names = ["Ahab", "Starbuck", "Queequeg", "Ishmael"]
    text.write_text(
        "\n\n".join(
            f"In the year {n} we saw {names[n % 4]} at {n % 7} bells go to the {n} th boat." for n in range(230)
        )
    )
    other = tmp_path / "other.txt"
    other.write_text(TEXT[:20_000])
    output = tmp_path / "records.jsonl"
    arguments = [
        "--model",
        str(folder),
        "--text",
        str(text),
        "--held-out",
        str(other),
        "--tokens",
        "55",
        "--pages",
        "2",
        "--added",
        "1",
        "--seeds",
        "1",
    ]
    assert main([*arguments, "--max-steps", "1", "--arm-steps", "1", "--json", "--output", str(output)]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert written[1:] == printed and "date" in written[0]["environment"]
    arms = [(record["suite"], record["arm"]) for record in printed if "arm" in record]
    assert [suite for suite, _ in arms] == ["page", "three", "pages", *["arms"] * 5, *["adapters"] * 3]
    shelf = [record for record in printed if record["suite"] == "shelf"]
    assert [(r["documents"], r.get("asked")) for r in shelf if "control" not in r] == [
        (1, None), (2, None), (2, "all"), (3, None), (3, "the first page"), (3, "all"),
    ]  # fmt: skip
    assert all(r["bytes"] > 0 and r["perplexity_ratio"] > 0 and r["steps"] == 1 for r in shelf if "document" in r)
    assert [record["control"] for record in shelf if "control" in record] == CONTROLS[3:]
    printed = [record for record in printed if record["suite"] != "shelf"]
    for record in printed:
        if "arm" in record:
            assert record["total"] == sum(level["total"] for level in record["levels"].values()) > 0
            assert record["steps"] == 1 and record["perplexity_ratio"] > 0
        else:
            assert record["exact"] == 0 <= record["queries"]
    assert [record["control"] for record in printed if "control" in record] == CONTROLS
