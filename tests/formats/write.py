"""Write an adapter, a memory file and checkpoints with the version that is checked out, for later versions to load.

`python -m tests.formats.write FOLDER` makes them anew. Those in `tests/formats/v0_2_0_dev0` are of the version that
their folder names; a version that changes a format adds a folder of its own and keeps these.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch

from r3mem_fast import R3MemConfig, R3MemPipeline, RememberSettings, TrainSettings
from r3mem_fast.training import history, remember

TEXT = "The ship left Nantucket at dawn. Ahab was mad about one whale."
LONG_TEXT = " ".join(f"On day {day} the ship sailed on." for day in range(40))
CONFIG = R3MemConfig(
    core=(1, 3), num_memory_tokens=4, segment_length=16, segment_overlap=4, max_memory_segments=3, lora_r=4
)
REMEMBER = RememberSettings(
    learning_rate=1e-2, anchor_windows=4, anchor_tokens=12, anchor_weight=1.0, divergence=1.0, decoys=2, max_steps=600
)
TRAIN = TrainSettings(steps=6, segments=2, warmup_steps=1, checkpoint_steps=2)


def main(base, target):
    """Write everything into `target`, from the tiny model in `base`."""
    shutil.copytree(base, target / "base")
    os.chdir(target)  # so that no file names a place of this machine
    pipeline = R3MemPipeline("base", config=CONFIG, dtype="float32")
    report = pipeline.remember({"ship": TEXT}, folder="adapter", settings=REMEMBER, progress=False)
    memory = pipeline.compress({"ship": TEXT, "log": LONG_TEXT}, progress=False)
    memory.save("memory.safetensors")
    query = report.pairs[0].query
    expected = {
        "query": query,
        "context": pipeline.recall(query),
        "exact": report.exact,
        "expanded": pipeline.expand(pipeline.compress(TEXT, progress=False), max_new_tokens=80),
        "generated": pipeline.generate("The ", memory=memory[0], max_new_tokens=8),
        "pairs": [[pair.level, pair.query, pair.context] for pair in report.pairs],
    }

    pipeline = R3MemPipeline("base", config=CONFIG, dtype="float32")
    settings = RememberSettings(**{**vars(REMEMBER), "max_steps": 5, "checkpoint_seconds": 0.0})
    report = remember.remember(
        pipeline.model, pipeline.tokenizer, report.pairs, settings, folder="remembering", progress=False
    )
    expected["remember_steps"] = report.steps

    pipeline = R3MemPipeline("base", config=CONFIG, dtype="float32")
    rows = [pipeline.tokenizer(LONG_TEXT, add_special_tokens=False).input_ids]
    report = history.train(pipeline.model, rows, TRAIN, folder="training", progress=False)
    expected["train_losses"] = report.losses
    checkpoints = Path("training/train-checkpoints")
    shutil.rmtree(checkpoints / "checkpoint-6")  # as if it had been killed before
    (checkpoints / "checkpoint-4" / "training_args.bin").unlink()  # a pickle with the name of this machine
    _name_no_place(Path("adapter"), str(target / "base"))
    for lock in Path().rglob(".r3mem.lock"):
        lock.unlink()
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def _name_no_place(adapter, base):
    """Call the base model "base" in an adapter's files, in place of the folder that it lay in."""
    config, manifest = adapter / "adapter_config.json", adapter / "r3mem.json"
    config.write_text(config.read_text().replace(base, "base"))
    described = json.loads(manifest.read_text())
    described["base_model"] = "base"
    described["files"][config.name] = hashlib.sha256(config.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    from tests.conftest import write_tiny_model

    target = Path(sys.argv[1]).absolute()
    torch.set_num_threads(1)
    write_tiny_model(target.parent / ".base")
    main(target.parent / ".base", target)
    shutil.rmtree(target.parent / ".base")
