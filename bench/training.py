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
    live_host_bytes   on a GPU, whose memory the two above are: what the layers keep in host memory
    max_memory_bytes  on a GPU: torch.cuda.max_memory_allocated of a training step, weights included
    peak_rss          on the CPU: peak resident memory of the arm's process over two steps, in bytes: weights,
                      libraries and the allocator's reserve are in it (off Linux, which can reset it: since the
                      process began)
    step_seconds      median time of forward, backward and optimizer step, with `step_seconds_quartiles`
    loss              of the first step, adapters untrained: of the plain network, or of the momentum network
    live_ratio, step_ratio    over checkpointing; the second is the median of the ratios within a round, with
                              `step_ratio_quartiles`
    note              what a reader must know about the arm; alone, why it did not run (out of memory)

The loss is the model's own, or with --loss fused (the default on a GPU) one that never holds the whole logits, the
same in every arm.

and with several --depth, one more an arm: `bytes_per_layer`, live_bytes' slope between neighbouring depths.
"""

import argparse
import contextlib
import gc
import inspect
import itertools
import json
import multiprocessing
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from r3mem_fast import MomentumCoupling, make_reversible, restore
from r3mem_fast.kernels.coupling import kept_bytes, side_bits_size
from r3mem_fast.measure import forward_memory, peak_rss, reset_peak_rss
from r3mem_fast.reversible.convert import find_decoder_layers

from .coupling_cases import DTYPES
from .models import SHAPES, apply_liger, fused_linear_cross_entropy, has_liger, load
from .records import add_output_option, write_records

BASELINE = "checkpoint"
ARMS = ("plain", BASELINE, "checkpoint-offload", "checkpoint-every-4", "reversible-b4", "reversible-b2")
LIGER = "-liger"  # an arm's name with this runs on Liger's kernels
LIGER_ARMS = tuple(arm + LIGER for arm in (BASELINE, "checkpoint-offload", "reversible-b4"))
_STEPS_FOR_PEAK = 2
_LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Task:
    """What every arm does.

    Attributes:
        depth: Decoder layers kept, None for all.
        threads: Number of PyTorch's threads.
        text: A file, None for the topics of Python's help.
        loss: `model` or `fused`.
    """

    model: str = "smollm2-135m"
    dtype: str = "bfloat16"
    tokens: int = 512
    batch: int = 1
    depth: int | None = None
    lora_rank: int = 16
    text: str | None = None
    threads: int = 1
    device: str = "cpu"
    loss: str = "model"


class Unavailable(Exception):
    """An arm cannot run here; the message says why."""


class TrainingArm:
    """A model set up for one arm, its optimizer and its batch.

    model: a causal language model with Llama's names of linear layers, changed in place. input_ids: `[batch, tokens]`.
    note: what a reader must know about how the arm runs, or None. Raises Unavailable, ValueError for an unknown arm.
    """

    def __init__(self, arm, model, input_ids, *, lora_rank, loss="model"):
        torch.manual_seed(0)
        config = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=_LINEAR_LAYERS, lora_dropout=0.0)
        # On a GPU the adapters have the model's dtype: in float32, PEFT's default, they would be run without tensor
        # cores and cast every activation up.
        widen = not input_ids.is_cuda
        self.model = get_peft_model(model, config, autocast_adapter_dtype=widen).train()
        # After the adapters: on a model with checkpointing, peft would make the embeddings' output want a gradient.
        self.note = set_up(model, arm)
        self.input_ids, self.loss = input_ids, loss
        self.layers = find_decoder_layers(model)[1]
        self._optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def forward(self):
        if self.loss == "fused":
            base = self.model.get_base_model()
            hidden = base.model(input_ids=self.input_ids, use_cache=False).last_hidden_state
            return fused_linear_cross_entropy(hidden, base.lm_head.weight, self.input_ids)
        return self.model(input_ids=self.input_ids, labels=self.input_ids, use_cache=False).loss

    def step(self):
        """One training step; returns its loss."""
        loss = self.forward()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()

    def time_as(self, arm):
        """Seconds of one training step of a plain arm's model, set up for `arm` and afterwards plain again."""
        base = self.model.get_base_model()
        set_up(base, arm)
        seconds = self.timed_step()
        tear_down(base, arm)
        return seconds

    def timed_step(self):
        """Seconds of one training step, on a GPU until it is done."""
        self._synchronize()
        start = time.perf_counter()
        self.step()
        self._synchronize()
        return time.perf_counter() - start

    def measure_as(self, arm):
        """`(note, loss, ForwardMemory, peak)` of a plain arm's model set up for `arm`, and afterwards plain again.

        peak: `torch.cuda.max_memory_allocated` over some training steps.
        """
        base = self.model.get_base_model()
        note = set_up(base, arm)
        try:
            loss = self.step()
            torch.cuda.reset_peak_memory_stats(self.input_ids.device)
            memory = self.live()
            self.step()
            return note, loss, memory, torch.cuda.max_memory_allocated(self.input_ids.device)
        finally:
            self._optimizer.zero_grad()
            tear_down(base, arm)

    def _synchronize(self):
        if self.input_ids.is_cuda:
            torch.cuda.synchronize(self.input_ids.device)

    def live(self):
        """`ForwardMemory` of a forward pass, which is then run backward without a step."""
        loss, memory = forward_memory(self.forward, self.layers[-1])
        loss.backward()
        self._optimizer.zero_grad()
        return memory


def set_up(model, arm):
    """Checkpointing or reversibility for `model`, by the arm's name; returns a note or None.

    Liger's kernels are put in where the model is loaded.
    """
    arm = arm.removesuffix(LIGER)
    if arm == "plain":
        return None
    if arm.startswith("reversible-b"):
        make_reversible(model, MomentumCoupling(bits=int(arm.removeprefix("reversible-b"))))
        return None
    if arm == "checkpoint-every-4":
        return _enable_checkpointing(model, every_n_layers=4)
    if arm == "checkpoint-offload":
        if not torch.accelerator.is_available():
            note = "no accelerator: transformers' own offload needs one to pin memory; save_on_cpu(pin_memory=False) "
            note += "copies to the same memory, which is counted"
        else:
            try:
                return _enable_checkpointing(model, offload=True)
            except Unavailable as reason:
                note = f"{reason}; save_on_cpu(pin_memory=True) in its place"
        _enable_checkpointing(model)
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = _checkpoint_on_host
        return note
    if arm == BASELINE:
        return _enable_checkpointing(model)
    raise ValueError(f"unknown arm {arm!r}; there are {', '.join(ARMS + LIGER_ARMS)}")


def tear_down(model, arm):
    """Undo `set_up`."""
    if arm.startswith("reversible"):
        restore(model)
    elif arm.startswith(BASELINE):
        # The name since transformers 5.23.
        disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
        disable()


def _enable_checkpointing(model, **options):
    kwargs = {"use_reentrant": False}
    # The name since transformers 5.23; versions before it may lack an option.
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs=kwargs, **options)
    else:
        if missing := options.keys() - inspect.signature(model.gradient_checkpointing_enable).parameters.keys():
            raise Unavailable(f"this version of transformers has no {', '.join(missing)} for checkpointing")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs, **options)
    # A gradient for the embeddings' output, which only reentrant checkpointing needs and no other arm computes.
    model.disable_input_require_grads()


def _checkpoint_on_host(function, *args):
    with save_on_cpu(pin_memory=torch.accelerator.is_available()):
        return checkpoint(function, *args, use_reentrant=False)


def load_arm(task, arm):
    """The `TrainingArm` for a task. Raises ValueError if the text is too short or the model not as deep as asked."""
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


def truncate(model, depth):
    """Keep the first `depth` decoder layers, in place; None keeps all."""
    if depth is None:
        return
    decoder, layers = find_decoder_layers(model)
    if not 1 <= depth <= len(layers):
        raise ValueError(f"depth must lie in 1..{len(layers)}, got {depth}")
    decoder.layers = decoder.layers[:depth]
    model.config.num_hidden_layers = depth
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:depth]


def measure(task, arms, *, runs, progress=lambda line: None, save=lambda records: None) -> list[dict]:
    """Measure `arms`; one record each, in their order.

    runs: rounds of one timed step an arm. progress: called with a line of text now and then. save: on a GPU, called
    with the records so far whenever there is more to them.
    Raises RuntimeError if a process fails.
    """
    if task.device == "cpu":
        records, seconds = _measure_on_cpu(task, arms, runs, progress)
        return _completed(records, seconds, arms)
    records, seconds = {}, {}

    def more(line):
        progress(line)
        save(_completed(records, seconds, arms))

    for ending in ("", LIGER):
        group = [arm for arm in arms if arm.endswith(LIGER) == bool(ending)]
        if group:
            _measure_on_gpu(task, group, "plain" + ending, runs, more, records, seconds)
    return _completed(records, seconds, arms)


def _completed(records, seconds, arms):
    """The records of `arms` so far, in order, with times and ratios from the rounds that all arms have run."""
    for arm, taken in seconds.items():
        if not taken:
            continue
        record = records[arm]
        record["runs"] = len(taken)
        record["step_seconds"], record["step_seconds_quartiles"] = _median(taken)
        if seconds.get(BASELINE):
            record["live_ratio"] = record["live_bytes"] / records[BASELINE]["live_bytes"]
            ratios = [own / other for own, other in zip(taken, seconds[BASELINE], strict=False)]
            record["step_ratio"], record["step_ratio_quartiles"] = _median(ratios)
    return [records[arm] for arm in arms if arm in records]


def _measure_on_cpu(task, arms, runs, progress):
    records = {}
    for arm in arms:
        progress(f"{arm}: loading, first step, live bytes, peak memory")
        with _Worker(task, arm) as worker:
            records[arm] = {"arm": arm, **_settings(task), **worker.ask("first")}
            if "live_bytes" in records[arm]:
                worker.ask("reset")
                for _ in range(_STEPS_FOR_PEAK):
                    worker.ask("step")
                records[arm]["peak_rss"] = worker.ask("peak")
    seconds = {arm: [] for arm in arms if "live_bytes" in records[arm]}
    # In one process, which changes from arm to arm: two processes differ in their memory's layout, and so in speed.
    with _Worker(task, "plain") as worker:
        worker.ask("first")
        _time(worker, seconds, runs, progress)
    return records, seconds


def _measure_on_gpu(task, arms, loaded, runs, progress, records, seconds):
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


def _time(worker, seconds, runs, progress):
    """Append `runs` timed steps to the list of every arm in `seconds`."""
    for index in range(runs if seconds else 0):
        # There and back: what drifts during a round favours no arm.
        for arm in list(seconds) if index % 2 == 0 else list(reversed(seconds)):
            seconds[arm].append(worker.ask(f"time {arm}"))
        taken = ", ".join(f"{arm} {values[-1]:.2f} s" for arm, values in seconds.items())
        progress(f"round {index + 1} of {runs}: {taken}")


def slopes(records) -> list[dict]:
    """One record an arm from records of several depths.

    It has `bytes_per_layer`, the slope of live_bytes between neighbouring depths, and for reversible arms what it
    should be the sum of.
    """
    found = []
    for arm in dict.fromkeys(record["arm"] for record in records):
        points = sorted((r["layers"], r["live_bytes"]) for r in records if r["arm"] == arm and "live_bytes" in r)
        pairs = list(itertools.pairwise(points))
        if not pairs:
            continue
        first = next(r for r in records if r["arm"] == arm and "live_bytes" in r)
        record = {
            "arm": arm,
            "depths": [layers for layers, _ in points],
            "bytes_per_layer": [_exact((b1 - b0) / (l1 - l0)) for (l0, b0), (l1, b1) in pairs],
        }
        for part in ("side_bytes_per_layer", "checksum_bytes_per_layer"):
            if part in first:
                record[part] = first[part]
        found.append(record)
    return found


def _exact(number):
    return int(number) if number == int(number) else number


def _median(values):
    if len(values) < 2:
        return values[0], [values[0], values[0]]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, [low, high]


def _settings(task):
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


def _text(task):
    if task.model in SHAPES:
        return "random tokens"
    return "pydoc_data.topics" if task.text is None else Path(task.text).name


class _Worker:
    """A process that holds one arm and works when asked."""

    def __init__(self, task, arm):
        self._arm = arm
        # Spawned, not forked: its memory is its own, and PyTorch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(task, arm, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._connection.close()
        if exception[0] is not None:
            self._process.terminate()
        self._process.join()

    def ask(self, what):
        try:
            self._connection.send(what)
            error, answer = self._connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"the process of arm {self._arm} ended; is there memory enough?") from None
        if error is not None:
            raise RuntimeError(f"arm {self._arm}: {error}")
        return answer


def _work(task, arm, connection):
    # Progress bars of loading, and a deprecation that peft meets inside transformers.
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    training = None
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
                    answer = _measured(training, what.removeprefix("measure "))
                elif what.startswith("time "):
                    answer = training.time_as(what.removeprefix("time "))
                else:
                    answer = peak_rss()
            except Exception as error:
                connection.send((f"{type(error).__name__}: {error}", None))
            else:
                connection.send((None, answer))


def _first(training, arm):
    # The step first: it makes what stays for good (gradients' buffers, tables, caches), which is not the pass's own.
    loss = training.step()
    return _record(training, arm, loss, training.live(), training.note)


def recover(error):
    """Let go of what a step held that ran out of memory: the error's traceback has its tensors."""
    error.__traceback__ = None
    gc.collect()
    torch.cuda.empty_cache()


def _measured(training, arm):
    try:
        note, loss, memory, peak = training.measure_as(arm)
    except Unavailable as reason:
        return {"note": str(reason)}
    except torch.OutOfMemoryError as error:
        recover(error)
        return {"note": "out of memory"}
    return {**_record(training, arm, loss, memory, note), "max_memory_bytes": peak}


def _record(training, arm, loss, memory, note):
    record = {"layers": len(training.layers), "loss": loss}
    device = training.input_ids.device.type
    record["live_bytes"], record["live_bytes_total"] = memory.on(device).layers, memory.on(device).total
    if device != "cpu":
        record["live_host_bytes"] = memory.on("cpu").layers
    if arm.startswith("reversible"):
        elements = training.input_ids.numel() * training.model.config.hidden_size
        bits = int(arm.removesuffix(LIGER)[-1])
        record["side_bytes_per_layer"] = side_bits_size(elements, bits)
        record["checksum_bytes_per_layer"] = kept_bytes(elements, None)
    if note is not None:
        record["note"] = note
    return record


def table(records) -> str:
    """The records as text, with ratios over checkpointing; notes below."""
    heads = ("arm", "layers", "live MB", "ratio", "with head", "peak MB", "step s", "ratio", "quartiles", "loss")
    rows = [heads]
    for record in records:
        if "live_bytes" not in record:
            rows.append((record["arm"], *["-"] * (len(heads) - 1)))
            continue
        peak, quartiles = record.get("max_memory_bytes", record.get("peak_rss")), record.get("step_ratio_quartiles")
        rows.append(
            (
                record["arm"],
                str(record["layers"]),
                f"{record['live_bytes'] / 1e6:.2f}",
                f"{record['live_ratio']:.3f}" if "live_ratio" in record else "-",
                f"{record['live_bytes_total'] / 1e6:.2f}",
                f"{peak / 1e6:.0f}" if peak is not None else "-",
                f"{record['step_seconds']:.3f}",
                f"{record['step_ratio']:.3f}" if "step_ratio" in record else "-",
                f"{quartiles[0]:.3f}–{quartiles[1]:.3f}" if quartiles is not None else "-",
                f"{record['loss']:.4f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        row[0].ljust(widths[0])
        + "".join(cell.rjust(width + 2) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    notes = dict.fromkeys(f"{record['arm']}: {record['note']}" for record in records if "note" in record)
    return "\n".join([*lines, *notes])


def slope_table(records) -> str:
    return "\n".join(
        f"{r['arm']}: {', '.join(f'{slope:,}' for slope in r['bytes_per_layer'])} bytes a layer"
        + (
            f" (side bits {r['side_bytes_per_layer']:,}, checksums {r['checksum_bytes_per_layer']:,})"
            if "side_bytes_per_layer" in r
            else ""
        )
        for r in records
    )


def main(arguments=None):
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
    parser.add_argument("--arms", type=lambda text: text.split(","), help=", ".join(ARMS + LIGER_ARMS))
    parser.add_argument("--runs", type=_positive, default=7, help="timed steps an arm (%(default)s)")
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
    if unknown := [arm for arm in arms if arm not in ARMS + LIGER_ARMS]:
        parser.error(f"unknown arm {unknown[0]!r}; there are {', '.join(ARMS + LIGER_ARMS)}")

    def progress(line):
        print(line, file=sys.stderr, flush=True)

    records = []

    def save(more):
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
            records += measure(task, arms, runs=options.runs, progress=progress, save=save)
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


def _positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _positive_list(text):
    return [_positive(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
