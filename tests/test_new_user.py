"""What somebody who is new meets at the command line and in the pipeline: every surprise is said, with what to do."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import r3mem_fast
from r3mem_fast import R3MemConfig, R3MemPipeline, RememberSettings, remembering
from r3mem_fast.cli import main
from tests.test_pipeline import SETTINGS

CONFIG = R3MemConfig(core=(1, 3), first_adapted_layer=0)
MEMORIES = R3MemConfig(core=(1, 3), num_memory_tokens=2, segment_length=8)
ONE_STEP = RememberSettings(max_steps=1, anchor_windows=2, anchor_tokens=8, decoys=1)


def run(*arguments, **settings):
    return subprocess.Popen(
        [sys.executable, "-m", "r3mem_fast", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["remember", "--help"], ["inspect", "{adapter}"]])
def test_what_needs_no_model_imports_no_torch(folder, tmp_path, arguments):
    R3MemPipeline(str(folder), config=CONFIG).save(tmp_path)
    code = (
        "import sys\nfrom r3mem_fast.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'slow'"
    )
    arguments = [argument.format(adapter=tmp_path) for argument in arguments]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if arguments == ["--version"]:
        assert done.stdout.strip() == f"r3mem_fast {r3mem_fast.__version__}"


def test_env_needs_no_transformers():
    code = (
        "import sys\nfrom r3mem_fast.cli import main\nassert main(['env', '--device', 'cpu']) == 0\n"
        "assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_first_line_comes_before_the_imports(folder, tmp_path):
    process = run("check", folder, "--tokens", "40", "--device", "cpu")
    assert process.stderr.readline() == f"Loading {folder} ...\n"
    process.kill()
    process.communicate()


def test_two_processes_on_one_folder(folder, tmp_path, capsys):
    """The second is told at once; what the first remembers is not lost."""
    text, other = tmp_path / "a.txt", tmp_path / "b.txt"
    text.write_text("Ahab of the Pequod was mad about the whale.")
    other.write_text("Starbuck was not.")
    command = ["--model", folder, "--core", "1,3", "--device", "cpu", "--threads", "1"]
    forever = ["--max-steps", "100000", "--checkpoint-seconds", "0"]
    # A parent may have told its children to ignore Ctrl-C, as shells do for what runs in the background.
    first = run(
        "remember", tmp_path / "adapter", text, *command, *forever,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while first.poll() is None and not (tmp_path / "adapter" / "remember-checkpoint.safetensors").exists():
        time.sleep(0.05)
    second = run("remember", tmp_path / "adapter", other, *command)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 2 and "another process is writing to" in said and "Loading" not in said
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    assert "A process is writing there right now" in capsys.readouterr().out
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130 and "interrupted. A run of `r3mem remember` was interrupted there" in said
    assert "give the same command again" in said


def test_a_folder_that_was_changed_since_it_was_loaded(folder, tmp_path):
    """Two pipelines of one folder, one after the other: the second does not write over what it never saw."""
    R3MemPipeline(str(folder), config=CONFIG).save(tmp_path / "a")
    first, second = R3MemPipeline(tmp_path / "a"), R3MemPipeline(tmp_path / "a")
    first.remember({"ship": "Ahab of the Pequod."}, folder=tmp_path / "a", settings=ONE_STEP, progress=False)
    with pytest.raises(ValueError, match="was changed after this pipeline loaded it"):
        second.remember({"boat": "Starbuck was not."}, folder=tmp_path / "a", settings=ONE_STEP, progress=False)
    second = R3MemPipeline(tmp_path / "a")
    second.remember({"boat": "Starbuck was not."}, folder=tmp_path / "a", settings=ONE_STEP, progress=False)
    written = json.loads((tmp_path / "a" / "r3mem.json").read_text())["remembered"]
    assert {entry["document"] for entry in written} == {"ship", "boat"}


@pytest.mark.parametrize("verb", ["remember", "train"])
def test_a_folder_that_cannot_be_written_to_is_found_out_first(folder, tmp_path, verb, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Ahab. " * 20)
    pipeline = R3MemPipeline(str(folder), config=MEMORIES)
    work = {"remember": "remember_documents", "train": "train"}[verb]
    monkeypatch.setattr(f"r3mem_fast.pipeline.{work}", lambda *args, **settings: 1 / 0)
    with pytest.raises(OSError, match="cannot make the folder /proc/r3mem"):
        getattr(pipeline, verb)(text, folder="/proc/r3mem")
    arguments = ["remember", "/proc/r3mem", str(text)] if verb == "remember" else ["train", str(text), "-o", "/proc/r"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "cannot make the folder /proc/r" in said and "Loading /" not in said and "Loading smoll" not in said


def test_texts_and_files(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("page.txt").write_text("Ahab of the Pequod was mad.\n")
    pipeline = R3MemPipeline(str(folder), config=MEMORIES)
    for call in (pipeline.remember, pipeline.compress):
        with pytest.raises(ValueError, match=r"'page.txt' is a file here: pass Path\('page.txt'\)"):
            call("page.txt")
    report = pipeline.remember(Path("page.txt"), settings=ONE_STEP, progress=False)
    assert report.pairs[0].context == "Ahab of the Pequod was mad." and report.pairs[0].document == "page.txt"
    assert pipeline.compress([Path("page.txt")], progress=False).labels == (("document", "page.txt"),)
    assert pipeline.compress("other.txt", progress=False).tokens_seen.tolist() == [len("other.txt")]
    with pytest.raises(ValueError, match="a file is named twice"):
        pipeline.compress([Path("page.txt"), Path("page.txt")])
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        pipeline.remember(Path("none.txt"))


def test_a_text_beyond_the_positions_is_cut_into_documents(folder, monkeypatch):
    """And a second time its parts are replaced, not added."""
    chapters = "\n\n".join(f"Chapter {n}\n\nThe whale {n} swam. Ahab saw it {n} times." for n in range(1, 5))
    pipeline = R3MemPipeline(str(folder), config=CONFIG)
    settings = {"settings": ONE_STEP, "levels": ["document"], "progress": False}
    # A tiny model learns nothing in a step.
    monkeypatch.setattr(remembering, "rehearsed_pairs", lambda entries, recall: [])
    for text, parts in ((chapters, 4), (chapters[: len(chapters) // 4], 1)):
        pipeline.remember({"book": text}, **settings)
        names = [entry["document"] for entry in pipeline.remembered]
        assert names == (["book"] if parts == 1 else [f"book, part {n}" for n in range(1, parts + 1)])
    # Those without a name, and one that is only called like a part, are not taken for parts of another.
    pipeline.remember([chapters], **settings)
    pipeline.remember(["Starbuck was not.", "Queequeg was."], **settings)
    pipeline.remember({"book, part 2": "Ishmael was alone."}, **settings)
    pipeline.remember({"book": "Short."}, **settings)
    names = {entry["document"] for entry in pipeline.remembered}
    assert names == {f"document 1, part {n}" for n in range(1, 5)} | {
        "document 2",
        "document 3",
        "book, part 2",
        "book",
    }
    with pytest.raises(ValueError, match="two documents would be called 'book, part 2'"):
        pipeline.remember({"book": chapters}, **settings)


def test_nonsense_is_said_and_no_success(folder, tmp_path, capsys, monkeypatch):
    R3MemPipeline(str(folder), config=MEMORIES).save(tmp_path / "trained")
    text, memory = tmp_path / "text.txt", str(tmp_path / "m.safetensors")
    text.write_text("Ahab of the Pequod was mad.")
    adapter, device = str(tmp_path / "trained"), ["--device", "cpu"]
    assert main(["recall", adapter, "Ahab", *device]) == 2
    assert "remembers nothing that could be recalled" in capsys.readouterr().err
    assert main(["compress", adapter, str(text), "-o", memory, *device]) == 0
    assert main(["expand", adapter, memory, *device]) == 2
    assert "has not learned to give back a text from its memory" in capsys.readouterr().err
    monkeypatch.setattr(R3MemPipeline, "generate", lambda self, prompts, **settings: [" \n"] * len(prompts))
    assert main(["generate", adapter, "Ahab", "--memory", memory, *device]) == 1
    assert "the model wrote nothing" in capsys.readouterr().err
    R3MemPipeline(str(folder), config=CONFIG).save(tmp_path / "plain")
    assert main(["compress", str(tmp_path / "plain"), str(text), "-o", memory, *device]) == 0
    assert main(["generate", str(tmp_path / "plain"), *device]) == 2
    assert "the prompt must follow it" in capsys.readouterr().err
    assert (
        main(["compress", str(tmp_path / "plain"), "-o", memory, str(text), *device]) == 0
    )  # the text behind an option
    assert main(["expand", str(tmp_path / "plain"), memory, *device]) == 2
    assert "has not learned to give back a text" in capsys.readouterr().err
    assert main(["check", str(folder), "--device", "nothing"]) == 2
    assert "names no device" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["check", str(folder), "--device", "cuda"]) == 2
        assert "sees no GPU. Use device cpu" in capsys.readouterr().err


def test_inspect_shows_a_run_that_was_interrupted(folder, tmp_path, capsys):
    (tmp_path / "remember-checkpoint.safetensors").write_text("x")
    assert main(["inspect", str(tmp_path)]) == 0
    assert "no adapter yet. A run of `r3mem remember` was interrupted there" in capsys.readouterr().out
    (tmp_path / "remember-checkpoint.safetensors").unlink()
    (tmp_path / "train-checkpoints").mkdir()
    R3MemPipeline(str(folder), config=CONFIG).save(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "A run of `r3mem train` was interrupted there" in printed and "LoRA rank 16" in printed
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    assert "interrupted" in json.loads(capsys.readouterr().out)


def test_the_bar_ends_where_the_run_is_expected_to_end(folder, capsys):
    pipeline = R3MemPipeline(str(folder), config=CONFIG)
    report = pipeline.remember("Ahab of the Pequod was mad.", settings=SETTINGS)
    shown = capsys.readouterr().err
    assert report.exact_match == 1
    assert "Remembering: 0 of 2 exact" in shown and "Remembering: 2 of 2 exact" in shown
    assert f"step={report.steps}, loss=" in shown and "Recalling all, 1 of " in shown


def test_threads_and_a_limit_of_steps(folder, tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("Ahab of the Pequod was mad.")
    monkeypatch.setenv("R3MEM_MAX_STEPS", "1")
    threads, asked = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    arguments = ["--model", str(folder), "--core", "1,3", "--device", "cpu", "--threads", "1", "--json"]
    assert main(["remember", str(tmp_path / "a"), str(text), *arguments]) == 1
    assert json.loads(capsys.readouterr().out)["steps"] == 1 and asked == [1]
    assert torch.get_num_threads() == threads


def test_no_noise_of_others(folder, tmp_path):
    """Neither weight bars nor warnings to developers, nor a complaint about the folder `kernels` that is in sight."""
    R3MemPipeline(str(folder), config=MEMORIES).save(tmp_path)
    done = run("generate", tmp_path, "Ahab", "--device", "cpu", cwd=Path(__file__).parents[1])
    _, said = done.communicate()
    assert said.splitlines() == [f"Loading {tmp_path} ..."], said
