"""A training step's memory and time: plain, with checkpointing of three kinds, and reversible.

    python -m bench.training --model smollm2-135m --tokens 512 --json
    python -m bench.training --model llama-3.1-8b-shape --tokens 8192 --device cuda --json     # random weights

Every arm trains the same LoRA adapters on the same tokens. On the CPU memory is measured in a process of its own for
each arm. Steps are timed in one process for all, whose model is set up for each arm in turn, so that step i of all
arms is measured under the same conditions and ratios are paired; on a GPU memory is measured there too, and the arms
with Liger's kernels, which cannot be taken out again, have a second process. One record an arm, with

    live_bytes        bytes created up to the exit of the last decoder layer and alive after the forward pass, however
                      held, without that layer's output, which the head needs in every arm
    live_bytes_total  the same with the head, the logits and the loss
    live_host_bytes   what the layers keep in host memory, which is in neither of the two above; without a GPU host
                      memory is the same memory, and what is copied to it is counted apart (`training_host`)
    max_memory_bytes  on a GPU: torch.cuda.max_memory_allocated of a training step, weights included
    peak_rss          on the CPU: peak resident memory of the arm's process over two steps, in bytes: weights,
                      libraries and the allocator's reserve are in it (off Linux, which can reset it: since the
                      process began)
    step_seconds      median time of forward, backward and optimizer step, with `step_seconds_quartiles`
    loss              of the first step, adapters untrained: of the plain network, or of the momentum network
    live_ratio, step_ratio    over checkpointing; the second is the median of the ratios within a round, with
                              `step_ratio_quartiles`
    note              what a reader must know about the arm; alone, why it did not run (out of memory)

With several --depth there is one more record an arm, with `bytes_per_layer`: live_bytes' slope between neighbouring
depths.

The loss is the model's own, or with --loss fused (the default on a GPU) one that never holds the whole logits, the
same in every arm.

The arms are in `training_arms`, ratios and tables in `training_report`; here are the processes that measure, and the
command.
"""

import argparse
import contextlib
import json
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

from r3mem_fast.measure import ForwardMemory, peak_rss, reset_peak_rss

from .coupling_cases import DTYPES
from .models import SHAPES, apply_liger, has_liger, load
from .records import add_output_option, write_records
from .training_arms import ALL_ARMS, ARMS, LIGER, LIGER_ARMS, Task, TrainingArm, Unavailable, recover, set_up, truncate
from .training_report import completed, slope_table, slopes, table

__all__ = [
    "ARMS",
    "LIGER",
    "LIGER_ARMS",
    "Task",
    "TrainingArm",
    "Unavailable",
    "load_arm",
    "main",
    "measure",
    "recover",
    "set_up",
    "slope_table",
    "slopes",
    "table",
    "truncate",
]

# Steps over which peak memory is measured.
_STEPS_FOR_PEAK = 2


def load_arm(task: Task, arm: str) -> TrainingArm:
    """Load the model of a task, and set it up for an arm.

    Raises:
        Unavailable: The arm cannot run here.
        ValueError: The text is too short, or the model not as deep as asked.
    """
    torch.set_num_threads(task.threads)
    model, input_ids = load(
        task.model,
        dtype=DTYPES[task.dtype],
        device=task.device,
        tokens=task.tokens,
        batch=task.batch,
        text=task.text,
    )
    truncate(model, task.depth)
    if arm.endswith(LIGER):
        if not has_liger() or not input_ids.is_cuda:
            raise Unavailable("needs the package liger-kernel and a GPU")
        apply_liger(model)
    return TrainingArm(arm, model, input_ids, lora_rank=task.lora_rank, loss=task.loss)


def measure(
    task: Task,
    arms: Sequence[str],
    *,
    runs: int,
    progress: Callable[[str], None] = lambda line: None,
    save: Callable[[list[dict]], None] = lambda records: None,
) -> list[dict[str, Any]]:
    """Measure arms.

    Args:
        task: What every arm does.
        arms: Names of the arms.
        runs: Rounds of one timed step an arm; 0: bytes alone are counted, in one process, with no peaks on the CPU.
        progress: Called with a line of text now and then.
        save: Where one process measures all arms, called with the records so far whenever there is more to them.

    Returns:
        One record an arm, in the order of `arms`.

    Raises:
        RuntimeError: A process failed.
    """
    arms = list(arms)
    if task.device == "cpu" and runs:
        records, seconds = _measure_on_cpu(task, arms, runs, progress)
        return completed(records, seconds, arms)
    records, seconds = {}, {}

    def more(line: str) -> None:
        progress(line)
        save(completed(records, seconds, arms))

    for ending in ("", LIGER):
        group = [arm for arm in arms if arm.endswith(LIGER) == bool(ending)]
        if group:
            _measure_in_one_process(task, group, "plain" + ending, runs, more, records, seconds)
    return completed(records, seconds, arms)


def _measure_on_cpu(
    task: Task, arms: list[str], runs: int, progress: Callable[[str], None]
) -> tuple[dict[str, dict], dict[str, list[float]]]:
    """Return records and seconds by arm."""
    records: dict[str, dict] = {}
    for arm in arms:
        progress(f"{arm}: loading, first step, live bytes, peak memory")
        with _Worker(task, arm) as worker:
            records[arm] = {"arm": arm, **_settings(task), **worker.ask("first")}
            if "live_bytes" in records[arm]:
                worker.ask("reset")
                for _ in range(_STEPS_FOR_PEAK):
                    worker.ask("step")
                records[arm]["peak_rss"] = worker.ask("peak")
    seconds: dict[str, list[float]] = {arm: [] for arm in arms if "live_bytes" in records[arm]}
    # Time all arms in one process, which changes from arm to arm: two processes differ in their memory's layout, and
    # so in speed.
    with _Worker(task, "plain") as worker:
        worker.ask("first")
        _time(worker, seconds, runs, progress)
    return records, seconds


def _measure_in_one_process(
    task: Task,
    arms: list[str],
    loaded: str,
    runs: int,
    progress: Callable[[str], None],
    records: dict[str, dict],
    seconds: dict[str, list[float]],
) -> None:
    """Fill `records` and `seconds` for arms of one process, which loads the arm `loaded`."""
    progress(f"{', '.join(arms)}: loading")
    with _Worker(task, loaded) as worker:
        unavailable = worker.ask("load")
        for arm in arms:
            records[arm] = {"arm": arm, **_settings(task), **(unavailable or worker.ask(f"measure {arm}"))}
            progress(f"{arm}: {records[arm].get('note', 'memory measured')}")
        timed = [arm for arm in arms if "live_bytes" in records[arm]]
        seconds.update({arm: [] for arm in timed})
        _time(worker, {arm: seconds[arm] for arm in timed}, runs, progress)


def _time(worker: "_Worker", seconds: dict[str, list[float]], runs: int, progress: Callable[[str], None]) -> None:
    """Append `runs` timed steps to the list of every arm in `seconds`."""
    for index in range(runs if seconds else 0):
        # Every other round goes backward, so that a drift during a round favours no arm.
        for arm in list(seconds) if index % 2 == 0 else list(reversed(seconds)):
            seconds[arm].append(worker.ask(f"time {arm}"))
        taken = ", ".join(f"{arm} {values[-1]:.2f} s" for arm, values in seconds.items())
        progress(f"round {index + 1} of {runs}: {taken}")


def _settings(task: Task) -> dict[str, Any]:
    """Return what every record says of the task."""
    return {
        "model": Path(task.model).name,
        "dtype": task.dtype,
        "batch": task.batch,
        "tokens": task.tokens,
        "lora_rank": task.lora_rank,
        "text": _text(task),
        "device": task.device,
        "loss_kind": task.loss,
    }


def _text(task: Task) -> str:
    if task.model in SHAPES:
        return "random tokens"
    return "pydoc_data.topics" if task.text is None else Path(task.text).name


class _Worker:
    """A process that holds one arm and works when asked."""

    def __init__(self, task: Task, arm: str) -> None:
        self._arm = arm
        # Spawned, not forked, so that its memory is its own; and PyTorch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(task, arm, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._connection.close()
        if exception[0] is not None:
            self._process.terminate()
        self._process.join()

    def ask(self, what: str) -> Any:
        """Have the process do one of the things that `_work` knows, and return its answer."""
        try:
            self._connection.send(what)
            error, answer = self._connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"the process of arm {self._arm} ended; is there memory enough?") from None
        if error is not None:
            raise RuntimeError(f"arm {self._arm}: {error}")
        return answer


def _work(task: Task, arm: str, connection: Connection) -> None:
    """Answer what a `_Worker` asks until it hangs up; each answer is `(error or None, result)`."""
    # Hide the progress bars of loading, and a deprecation that peft meets inside transformers.
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    training: Any = None
    answer: Any
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            what = connection.recv()
            try:
                if what in ("first", "load"):
                    try:
                        training = load_arm(task, arm)
                    except Unavailable as reason:
                        connection.send((None, {"note": str(reason)}))
                        continue
                    answer = _first(training, arm) if what == "first" else None
                elif what == "reset":
                    answer = reset_peak_rss()
                elif what == "step":
                    answer = training.step()
                elif what.startswith("measure "):
                    answer = _measured(training, what.removeprefix("measure "), task.device)
                elif what.startswith("time "):
                    answer = training.time_as(what.removeprefix("time "))
                else:
                    answer = peak_rss()
            except Exception as error:
                connection.send((f"{type(error).__name__}: {error}", None))
            else:
                connection.send((None, answer))


def _first(training: TrainingArm, arm: str) -> dict[str, Any]:
    # Step before counting: the first step makes what stays for good (gradients' buffers, tables, caches), which is not
    # what a pass keeps.
    loss = training.step()
    return _record(training, arm, loss, training.live(), training.note)


def _measured(training: TrainingArm, arm: str, device: str) -> dict[str, Any]:
    try:
        if device == "cpu":
            note, loss, memory = training.count_as(arm)
            return _record(training, arm, loss, memory, note)
        note, loss, memory, peak = training.measure_as(arm)
    except Unavailable as reason:
        return {"note": str(reason)}
    except torch.OutOfMemoryError as error:
        recover(error)
        return {"note": "out of memory"}
    return {**_record(training, arm, loss, memory, note), "max_memory_bytes": peak}


def _record(training: TrainingArm, arm: str, loss: float, memory: ForwardMemory, note: str | None) -> dict[str, Any]:
    record: dict[str, Any] = {"layers": len(training.layers), "loss": loss}
    device = training.input_ids.device.type
    own, on_host = memory.on(device), training.host_bytes
    apart = on_host if device == "cpu" else 0  # of what is counted as the device's
    record |= {"live_bytes": own.layers - apart, "live_bytes_total": own.total - apart, "live_host_bytes": on_host}
    record |= training.bytes_per_layer(arm)
    if note is not None:
        record["note"] = note
    return record


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure as the command line says; print the records or a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model",
        default="smollm2-135m",
        help=f"smollm2-135m, a folder or a hub id; random weights: {', '.join(SHAPES)} (%(default)s)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(a GPU if there is one)")
    parser.add_argument("--loss", choices=["model", "fused"], help="(fused on a GPU, else the model's own)")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of the weights (%(default)s)")
    parser.add_argument("--tokens", type=_positive, default=512, help="in a sequence (%(default)s)")
    parser.add_argument("--batch", type=_positive, default=1, help="sequences (%(default)s)")
    parser.add_argument("--depth", type=_positive_list, help="decoder layers kept, as in 8,16,30 (all)")
    parser.add_argument("--arms", type=lambda text: text.split(","), help=", ".join(ALL_ARMS))
    parser.add_argument("--runs", type=_positive, default=7, help="timed steps an arm (%(default)s)")
    parser.add_argument("--bytes", action="store_true", help="count bytes alone, which are the same on a busy machine")
    parser.add_argument("--lora-rank", type=_positive, default=16, help="(%(default)s)")
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads(), help="(%(default)s)")
    parser.add_argument("--text", help="a text file to train on, in place of Python's help topics")
    parser.add_argument("--json", action="store_true", help="print one JSON line an arm")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here")
    arms = options.arms or list(ARMS if device == "cpu" else ARMS + LIGER_ARMS)
    if unknown := [arm for arm in arms if arm not in ALL_ARMS]:
        parser.error(f"unknown arm {unknown[0]!r}; there are {', '.join(ALL_ARMS)}")

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    records: list[dict] = []

    def save(more: list[dict]) -> None:
        if options.output:
            write_records(options.output, [*records, *more])

    try:
        for depth in options.depth or [None]:
            task = Task(
                model=options.model,
                dtype=options.dtype,
                tokens=options.tokens,
                batch=options.batch,
                depth=depth,
                lora_rank=options.lora_rank,
                text=options.text,
                threads=options.threads,
                device=device,
                loss=options.loss or ("model" if device == "cpu" else "fused"),
            )
            records += measure(task, arms, runs=0 if options.bytes else options.runs, progress=progress, save=save)
    except (RuntimeError, OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")
    lines = slopes(records) if options.depth and len(options.depth) > 1 else []
    if options.json:
        for record in [*records, *lines]:
            print(json.dumps(record))
    else:
        print(table(records))
        if lines:
            print(slope_table(lines))
    if options.output:
        torch.set_num_threads(options.threads)
        write_records(options.output, [*records, *lines])


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _positive_list(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
