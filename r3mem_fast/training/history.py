"""Trains a memory network on long texts, segment by segment, with transformers' Trainer."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from ..files import replacing
from ..integrations.masters import MasterAdamW, keep_master_weights
from ..integrations.scoped import temporarily, unchanged_on_failure
from ..manifest import TRAIN_CHECKPOINTS
from ..model import R3MemModel
from ..reversible import check_integrity
from .machine import steps_at_most, warn_if_busy
from .settings import TrainSettings

_RUN = "run.json"


@dataclasses.dataclass(frozen=True)
class TrainReport:
    """Report of a training run.

    Attributes:
        steps: Number of steps, including those before an interruption.
        tokens: Number of tokens trained on, including those before an interruption.
        windows: Number of windows that the texts were cut into.
        seconds: Seconds that this process took.
        losses: Pairs `(step, loss)`, the loss in nats a token. It is a mean over the steps since the pair before, or
            since the run went on after an interruption.
        left_out: Number of tokens that were not trained on, in windows of a segment at most, where no memory is read.
    """

    steps: int
    tokens: int
    windows: int
    seconds: float
    losses: list[tuple[int, float]]
    left_out: int = 0

    def __str__(self) -> str:
        loss = f", loss {self.losses[-1][1]:.4f}" if self.losses else ""
        left_out = f"; {self.left_out} tokens too short for a memory were left out" if self.left_out else ""
        return (
            f"{self.steps} steps on {self.windows} windows, {self.tokens} tokens{loss}, {self.seconds:.0f} s{left_out}"
        )


class Windows(Dataset):
    """Dataset of windows, into which the token ids of texts are cut from their start.

    A window that is not longer than a segment is left out, as no memory would be read in it.

    Args:
        rows: Token ids of each text.
        segment_length: Tokens of a segment.
        segments: Segments of a window.
        memories: Whether memories are read. If not, whole texts of two tokens or more are not left out, however short;
            of longer texts the windows are the same, to compare models with and without memories.

    Attributes:
        left_out: Number of tokens in windows that are left out.

    Raises:
        ValueError: No window is left.
    """

    def __init__(self, rows: Sequence[Sequence[int]], segment_length: int, segments: int, *, memories: bool = True):
        size, self._windows = segment_length * segments, []
        for row in rows:
            least = segment_length if memories or len(row) > segment_length else 1
            windows = (torch.tensor(row[i : i + size]) for i in range(0, len(row), size))
            self._windows += [window for window in windows if len(window) > least]
        self.left_out = sum(map(len, rows)) - sum(map(len, self._windows))
        if not self._windows and not memories:
            raise ValueError("no text has two tokens, of which the second could be predicted")
        if not self._windows:
            raise ValueError(
                f"no text has more than {segment_length} tokens, one segment, so no memory would be read; use longer "
                "texts, or a shorter segment_length"
            )

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._windows[index]}


def collate_windows(windows: Sequence[dict[str, torch.Tensor]], unlearned: int = 0) -> dict[str, torch.Tensor]:
    """Make a batch of windows, padded on the right.

    Args:
        windows: Items of `Windows`.
        unlearned: First tokens of each window that do not count in the loss.

    Returns:
        `input_ids`, `attention_mask` (0 for padding) and `labels` (-100 for padding and those first tokens), int64
        `[B, T]` each.
    """
    ids = torch.nn.utils.rnn.pad_sequence([window["input_ids"] for window in windows], batch_first=True)
    lengths = torch.tensor([len(window["input_ids"]) for window in windows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(torch.int64)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :unlearned] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(
    model: R3MemModel,
    rows: Sequence[Sequence[int]],
    settings: TrainSettings | None = None,
    *,
    folder: str | Path,
    progress: bool = True,
) -> TrainReport:
    """Train the adapters and memory tokens of a model on long texts, through the memories of their segments.

    The loss is that of `R3MemModel.forward` with labels, in nats a token, with the model's `distillation_weight`. With
    weights in bfloat16, autocast to bfloat16 is on; adapters and the optimizer's moments are float32. With the setting
    `adapter_precision="bfloat16"` autocast is off, and adapters are bfloat16 until training ends; what is stepped and
    saved is float32 (`MasterAdamW`). A model without memory tokens reads each window in one pass: an ordinary
    fine-tune, to compare with. If training is interrupted, or fails, the adapter is as it was before.

    Args:
        model: The model.
        rows: Token ids of each text, of any length.
        settings: How it is trained; None: the defaults.
        folder: Folder for checkpoints. A run of the same texts and settings that was interrupted (Ctrl-C, a killed
            process) goes on from the last whole one, to the same result. Checkpoints are left there at the end: call
            `discard_checkpoints(folder)` once the model is saved.
        progress: Show a bar.

    Returns:
        A report.

    Raises:
        ValueError: The model is in float16 or on another device than Trainer's, adapters are to be in bfloat16 and the
            model is not, all texts are too short, or the folder holds the checkpoints of another run.
        IntegrityError: A pass could not be trusted.
    """
    settings = TrainSettings() if settings is None else settings
    settings = dataclasses.replace(settings, steps=steps_at_most(settings.steps))
    if progress:
        warn_if_busy(model.device)
    if model.peft_model.dtype == torch.float16:
        raise ValueError("training in float16 overflows without a scaled loss; load the model in bfloat16 or float32")
    rounded = settings.adapter_precision == "bfloat16"
    if rounded and model.peft_model.dtype != torch.bfloat16:
        raise ValueError(
            f'adapter_precision="bfloat16" is for weights in bfloat16, and the model\'s are {model.peft_model.dtype}: '
            'adapters in another dtype would cast what they are given. Load it in bfloat16, or use "float32"'
        )
    if model.learns_memories and model.memory_embeddings is None:
        raise ValueError(
            "matched memories need no training, and have nothing that could learn: compress with the model as "
            'it is, or let memory tokens learn (memory_writer="tokens")'
        )
    sizes = settings.drawn_memory_tokens or ()
    if sizes and not model.is_anchored:
        raise ValueError('drawn_memory_tokens is for anchored memories (memory_writer="anchored")')
    share = settings.foreign_memories
    if share and not (model.learns_memories and model.adapts_tokens and model.r3mem_config.distillation_weight):
        raise ValueError(
            f"foreign_memories={share!r} teaches adapters that read memories, by the base model: it needs these, "
            'adapter_rows="all" and a distillation_weight'
        )
    for size in sizes:
        model.reader.layout.with_memory_tokens(size)  # raises an error for one that cannot be
    kept = [row[: len(row) - int(len(row) * settings.held_out)] for row in rows]
    windows = Windows(kept, model.r3mem_config.segment_length, settings.segments, memories=model.learns_memories)
    checkpoints = Path(folder) / TRAIN_CHECKPOINTS
    last = _prepared(checkpoints, _identity(model, kept, settings))
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_steps,
        weight_decay=0.0,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=model.peft_model.dtype == torch.bfloat16 and not rounded,
        use_cpu=model.device.type == "cpu",
        save_steps=settings.checkpoint_steps,
        save_total_limit=2,
        logging_steps=min(10, settings.steps),
        logging_first_step=True,
        include_num_input_tokens_seen="non_padding",
        seed=settings.seed,
        report_to=[],
        disable_tqdm=not progress,
        remove_unused_columns=False,
        dataloader_pin_memory=model.device.type != "cpu",
    )
    if model.device != arguments.device:
        raise ValueError(
            f"the model is on {model.device}, and Trainer trains on {arguments.device}; choose a GPU by "
            "CUDA_VISIBLE_DEVICES"
        )
    # With several GPUs Trainer would replicate the model, and replicas have no parameters of their own.
    arguments._n_gpu = 1
    if last is not None and _step_of(last) == settings.steps:  # killed on the way to saving
        model.load_state_dict(load_file(last / SAFE_WEIGHTS_NAME))
        model.eval()
        return _report(TrainerState.load_from_json(last / TRAINER_STATE_NAME), windows, 0.0)
    _, of_optimizer = Trainer.get_optimizer_cls_and_kwargs(arguments)
    # The base model reads the first segment, behind no memory, or is all that teaches adapters how: nothing to learn.
    taught = model.is_anchored and (model.reads_as_base or model.r3mem_config.distillation_weight == 1)
    unlearned = model.reader.layout.segment_length if taught else 0
    trainer = Trainer(
        model,
        arguments,
        functools.partial(collate_windows, unlearned=unlearned),
        train_dataset=windows,
        callbacks=[_CheckIntegrity(model)],
        optimizer_cls_and_kwargs=(MasterAdamW, of_optimizer) if rounded else None,
    )
    trainer.remove_callback(PrinterCallback)
    started = time.monotonic()
    try:
        # What was learned is in the checkpoints.
        drawn = temporarily(model, drawn_sizes=sizes, foreign_share=share)
        with unchanged_on_failure(model), drawn, contextlib.ExitStack() as afterwards:
            afterwards.callback(keep_master_weights, model)
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
    finally:
        model.eval()
        for name in ("forward", "_original_forward"):  # accelerate wrapped the forward pass, to convert its output
            vars(model).pop(name, None)
    return _report(trainer.state, windows, time.monotonic() - started)


def _report(state, windows, seconds):
    losses = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
    tokens = int(state.num_input_tokens_seen)
    return TrainReport(state.global_step, tokens, len(windows), seconds, losses, windows.left_out)


def discard_checkpoints(folder: str | Path) -> None:
    """Delete the checkpoints that `train` left in a folder."""
    shutil.rmtree(Path(folder) / TRAIN_CHECKPOINTS, ignore_errors=True)


class _CheckIntegrity(TrainerCallback):
    """Raises IntegrityError before a step of the optimizer if a pass could not be trusted."""

    def __init__(self, model):
        self._model = model

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        check_integrity(self._model)


def _prepared(checkpoints, identity):
    """The last whole checkpoint of this run; None at its start. Half-written ones of a killed process are deleted."""
    found = list(checkpoints.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    # Trainer writes its state after all other files.
    whole = [path for path in found if _is_json(path / TRAINER_STATE_NAME)]
    run = checkpoints / _RUN
    if whole and not (_is_json(run) and json.loads(run.read_text(encoding="utf-8")) == identity):
        raise ValueError(
            f"{checkpoints} belongs to an unfinished run with other texts, settings or another model. Finish that "
            "run, delete the folder, or choose another one"
        )
    for path in set(found) - set(whole):
        shutil.rmtree(path)
    checkpoints.mkdir(parents=True, exist_ok=True)
    with replacing(run) as path:
        path.write_text(json.dumps(identity), encoding="utf-8")
    return max(whole, key=_step_of, default=None)


def _step_of(checkpoint):
    return int(checkpoint.name.rpartition("-")[2])


def _is_json(path):
    with contextlib.suppress(OSError, ValueError):
        json.loads(path.read_text(encoding="utf-8"))
        return True
    return False


def _identity(model, rows, settings):
    """Values for JSON that are the same for a run and for the checkpoints that it may go on from."""
    free = ("checkpoint_steps",)
    described = {name: value for name, value in dataclasses.asdict(settings).items() if name not in free}
    if settings.adapter_precision == "float32":  # a later setting: checkpoints from before it are of such runs
        del described["adapter_precision"]
    for later in ("drawn_memory_tokens", "foreign_memories"):
        if not described[later]:
            del described[later]
    origin = model.origin_of_adapters()
    return {
        "settings": json.loads(json.dumps(described)),  # where a tuple is a list
        "model": [origin.base, origin.adapter, str(model.peft_model.dtype)],
        "config": json.loads(json.dumps(model.r3mem_config.to_dict())),
        "texts": hashlib.sha256(json.dumps([list(row) for row in rows]).encode()).hexdigest(),
    }
