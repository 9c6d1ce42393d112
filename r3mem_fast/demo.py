"""`r3mem demo`: makes a real model reversible, proves it exact, fine-tunes it, and shows what it kept in memory."""

import itertools
import os
import statistics
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

from .data.models import EMBEDDED_ADAPTER, EMBEDDED_MODEL, load_model, missing_packages
from .data.text import pages_of, read_text, token_windows
from .files import check_writable, replacing
from .integrations.compat import checkpointing_switches
from .measure import StorageRecorder
from .pipeline import R3MemPipeline
from .reversible import MomentumCoupling, check_gradients, check_inverse, make_reversible, restore
from .reversible.convert import find_decoder_layers, text_config
from .training.remember import RememberSettings

# Ways of training that are compared.
ARMS = ("plain", "checkpointing", "reversible")
_TIMING_ROUNDS = 3
# Numbers of windows: held out from fine-tuning, and read behind memories.
_HELD_OUT = 4
_MEMORY_WINDOWS = 12
# A text that no model has seen, and what it says: prompts, and how they go on.
_NOTE = """The Lantern is a small ship that carries mail between the northern islands. Captain Ines Morau has commanded
it for eleven years. She grew up on Tarsk, where her father repaired nets, and she still keeps one of his
needles in her cabin. The crew is five: the mate Olin Bask, the engineer Petra Vale, two sailors and a cook
who is called Dumpling, although his name is Henrik. On the third of March the Lantern left Tarsk with
forty-two sacks of mail and a crate of oranges for the school at Brennick. In the evening the wind rose, and
the rudder chain broke off the Grey Cape. Petra Vale mended it with a part of the anchor chain while Olin
Bask held the bow to the waves with the smaller sail. They reached Brennick a day late. No sack was lost,
but the oranges had frozen; the teacher, Mrs Adler, made marmalade of them. Since then the children of
Brennick paint an orange on every letter that they send by the Lantern.\n\n"""
_FACTS = {
    "The crate that the Lantern carried to the school was full of": " oranges",
    "The rudder chain was mended by": " the engineer Petra Vale",
    "The captain of the Lantern is": " Ines Morau",
    "The teacher, Mrs Adler, made": " marmalade",
}


def run_demo(
    *,
    model_name: str,
    text: str | os.PathLike[str] | None,
    tokens: int,
    steps: int,
    remember_steps: int,
    dtype: str,
    bits: int,
    fraction_bits: int | str,
    device: torch.device | str,
    output: str | os.PathLike[str],
) -> None:
    """Run the whole demonstration, printing its results as they come, and draw a picture.

    Args:
        model_name: "smollm2-135m", a folder or a hub id.
        text: Path of a UTF-8 text file to train on; None: the topics of Python's help.
        tokens: Tokens of a training window.
        steps: Steps of fine-tuning.
        remember_steps: The most steps of remembering a page.
        dtype: Name of the weights' dtype.
        bits: Side bits of the reversible network.
        fraction_bits: Fraction bits of its streams, or "auto".
        device: Where everything runs.
        output: Path of the picture, a PNG file.

    Raises:
        OSError: The model, the text or a package is missing, or the picture's folder cannot be written to.
        ValueError: The picture's folder is missing, or the text is too short.
    """
    output = Path(output)
    if not output.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {output.parent} to write the picture to")
    check_writable(output.absolute().parent)
    # Tell all that is missing now, not after minutes of training.
    missing = missing_packages("matplotlib")
    if model_name != EMBEDDED_MODEL:
        missing = {name: command for name, command in missing.items() if name == "matplotlib"}
    if missing:
        raise OSError(f"the demo needs {', '.join(missing)}: run `{' && '.join(missing.values())}`")
    text = read_text(text)

    base: Any
    base, tokenizer = load_model(model_name, dtype=getattr(torch, dtype))
    positions = getattr(text_config(base.config), "max_position_embeddings", None) or 1024
    page = next(iter(pages_of(text, tokenizer, 1, tokens=min(200, positions // 2)).values()))
    base.to(device)
    windows = token_windows(tokenizer, text, tokens=tokens).to(device)
    if len(windows) < _HELD_OUT + 1:
        raise ValueError(f"the text has {len(windows)} windows of {tokens} tokens; {_HELD_OUT + 1} are needed")
    # Draw both from all over the text, so that training and held-out windows are alike.
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    held_out, training = windows[order[:_HELD_OUT]], windows[order[_HELD_OUT:]]

    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    coupling = MomentumCoupling(bits=bits, fraction_bits=fraction_bits)
    batch = training[:1]
    loss_plain = _loss(model, held_out)

    print("Running every layer backward, and comparing with what ran forward ...", flush=True)
    make_reversible(model, coupling)
    inverse = check_inverse(model, batch)
    print(f"  {inverse}")
    gradients = check_gradients(model, batch)
    print(f"  {gradients}", flush=True)
    loss_before = _loss(model, held_out)
    restore(model)

    print("Measuring a training step: plain, with checkpointing, reversible ...", flush=True)
    measured = _measure(model, coupling, batch)

    make_reversible(model, coupling)
    losses, seconds = _fine_tune(model, training, steps)
    loss_after = _loss(model, held_out)
    restore(model)
    loss_plain_after = _loss(model, held_out)

    _print_table(measured, exact=inverse.exact, bits=bits, tokens=tokens, dtype=dtype)
    print(
        f"\n{len(losses)} reversible steps in {seconds:.0f} s. Loss on {_HELD_OUT} held-out windows: "
        f"{loss_before:.3f} before, {loss_after:.3f} after;\n"
        f"the ordinary network: {loss_plain:.3f} before, {loss_plain_after:.3f} with the adapters trained reversibly."
    )
    title = f"{model_name}, {tokens} tokens, {dtype}, LoRA"
    _draw(output, measured, losses, held_out=(loss_before, loss_after), bits=bits, title=title)
    print(f"Picture: {output}")
    if positions >= 1024:
        _write_behind_a_memory(model_name, device)
    else:
        print(f"\nWith {positions} positions {model_name} is too small for the text to be compressed: not shown.")
    _remember_a_page(model_name, page, remember_steps, device)
    if model_name == EMBEDDED_MODEL:
        # It has learned of the first half of the topics of Python's help.
        _read_behind_memories(EMBEDDED_ADAPTER, text[len(text) // 2 :], device)
    else:
        print(f"\nThe memory adapter that comes with this package is for {EMBEDDED_MODEL}: not shown.")


def _remember_a_page(model_name: str, page: str, max_steps: int, device: torch.device | str) -> None:
    """Fine-tune a page into a new adapter, and recall a context of each level, reading backward from its query."""
    print(f"\nRemembering a page, until every context comes back exactly ({model_name}) ...", flush=True)
    pipeline = R3MemPipeline(model_name, device=device)
    report = pipeline.remember(page, settings=RememberSettings(max_steps=max_steps))
    print(report)
    for pair in {pair.level: pair for pair in report.pairs}.values():
        recalled = str(pipeline.recall(pair.query))  # one string, as the query is one
        verdict = "exact" if recalled == pair.context else "NOT exact"
        print(f"  {pair.level}: {pair.query!r}\n    -> {verdict}: {textwrap.shorten(recalled, 100)!r}")


def _read_behind_memories(adapter: str, text: str, device: torch.device | str, count: int = _MEMORY_WINDOWS) -> None:
    """Print what memories of an adapter that was trained for them are worth on a text, in nats a token."""
    pipeline = R3MemPipeline(adapter, device=device)
    model, layout = pipeline.model, pipeline.model.layout
    assert layout is not None, "the adapter has no memory tokens"
    length, overlap, slots = layout.segment_length, layout.segment_overlap, layout.num_memory_tokens
    windows = token_windows(pipeline.tokenizer, text, tokens=2 * length, count=count).to(device)
    losses: dict[str, list[float]] = {name: [] for name in ("tail", "memory", "full")}
    with torch.no_grad():
        for window in windows.split(1):
            before, segment = window[:, :length], window[:, length:]
            logits = {
                "tail": model(window[:, length - overlap :]).logits[:, -length:],
                "memory": model(segment, memory=model.compress(before, finish=True)).logits,
                "full": model(window).logits[:, -length:],
            }
            for name, values in logits.items():
                loss = torch.nn.functional.cross_entropy(values[0, :-1].float(), segment[0, 1:])
                losses[name].append(loss.item())
    print(f"\nReading {count} segments of {length} tokens behind the segment before, with the adapter {adapter}:")
    for name, what in (
        ("tail", f"its last {overlap} tokens"),
        ("memory", f"these, and a memory of it in {slots} slots"),
        ("full", f"all of its {length} tokens"),
    ):
        print(f"  {what:44} {statistics.fmean(losses[name]):.4f} nats a token")


def _write_behind_a_memory(
    model_name: str, device: torch.device | str, note: str = _NOTE, facts: dict[str, str] = _FACTS
) -> None:
    """Compress a text with no training, and print what the model writes behind the memory, and without it."""
    pipeline = R3MemPipeline(model_name, device=device)
    memory = pipeline.compress(note, finish=True, progress=False)
    assert memory.slots is not None
    print(
        f"\nCompressing a text of {pipeline.codec.count(note)} tokens into {int(memory.slots[0])} slots a layer and "
        f"its last {len(memory.recent[0])} tokens, with no training ({model_name}):"
    )
    nats: dict[str, list[float]] = {name: [] for name in ("behind the memory", "without it", "behind the whole text")}
    with pipeline.model.disable_adapters():
        for prompt, answer in facts.items():
            written = [
                pipeline.generate(prompt, memory=before, max_new_tokens=8, do_sample=False)
                for before in (memory, None)
            ]
            print(f"  {prompt} ...")
            for where, text in zip(nats, written, strict=False):
                print(f"    {where + ':':19} ...{' '.join(str(text).split())}")
            for where, before in zip(nats, (memory, None, note), strict=True):
                nats[where].append(_nats_of(pipeline, before, prompt, answer))
    print("  What the text says itself, in nats a token:", end=" ")
    print(", ".join(f"{statistics.fmean(values):.2f} {where}" for where, values in nats.items()))


def _nats_of(pipeline: R3MemPipeline, before: Any, prompt: str, answer: str) -> float:
    """Return the surprise of an answer to a prompt behind a memory, a text or nothing, in nats a token."""
    text, memory = (before, None) if isinstance(before, str) else ("", before)
    asked, wanted = pipeline.codec.ids(text + prompt), pipeline.codec.ids(answer)
    ids = torch.tensor([asked + wanted], device=pipeline.model.device)
    with torch.no_grad():
        logits = pipeline.model(ids, memory=memory).logits[0, len(asked) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.float(), ids[0, len(asked) :]).item()


def _loss(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """Return the mean next-token cross-entropy, in nats."""
    model.eval()
    with torch.no_grad():
        return statistics.fmean(model(input_ids=w[None], labels=w[None]).loss.item() for w in windows)


def _measure(model: Any, coupling: MomentumCoupling, batch: torch.Tensor) -> dict[str, dict[str, list]]:
    """Measure each arm: bytes that the decoder layers keep, accumulated over depth, and seconds of each step."""
    enable = {
        "plain": lambda: None,
        "checkpointing": lambda: _checkpointing(model, True),
        "reversible": lambda: make_reversible(model, coupling),
    }
    disable = {
        "plain": lambda: None,
        "checkpointing": lambda: _checkpointing(model, False),
        "reversible": lambda: restore(model),
    }
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    measured: dict[str, dict[str, list]] = {arm: {"seconds": []} for arm in ARMS}

    def forward() -> torch.Tensor:
        return model(input_ids=batch, labels=batch, use_cache=False).loss

    # Round 0 warms up, and measures memory. The arms take turns, so that a drift of the machine's speed favours none.
    for round_index in range(_TIMING_ROUNDS + 1):
        for arm in ARMS:
            enable[arm]()
            if round_index == 0:
                measured[arm]["bytes_by_layer"] = _bytes_by_layer(model, forward)
            start = time.perf_counter()
            torch.autograd.grad(forward(), trainable)
            _synchronize(batch.device)
            if round_index:
                measured[arm]["seconds"].append(time.perf_counter() - start)
            disable[arm]()
    return measured


def _bytes_by_layer(model: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> list[int]:
    """Count, for each decoder layer, the bytes created up to its exit and alive after the forward pass.

    The last layer's output does not count: the head needs it in every arm.
    """
    layers = find_decoder_layers(model)[1]
    recorder = StorageRecorder(phase=0)
    phases = itertools.count(1)

    def leave(module, args, output):
        recorder.begin(next(phases))
        if module is layers[-1]:
            recorder.relabel(output, len(layers))

    handles = [layer.register_forward_hook(leave) for layer in layers]
    try:
        with recorder:
            loss = forward()  # carries the graph, so keep it until the storages are counted
        kept = [0] * len(layers)
        for storage in recorder.live():
            if isinstance(storage.phase, int) and storage.phase < len(layers):
                kept[storage.phase] += storage.nbytes
        del loss
    finally:
        for handle in handles:
            handle.remove()
    return list(itertools.accumulate(kept))


def _checkpointing(model: Any, enabled: bool) -> None:
    """Turn checkpointing of a model with adapters on or off."""
    base = model.get_base_model()
    enable, disable = checkpointing_switches(base)
    if not enabled:
        disable()
        return
    enable({"use_reentrant": False})
    # Enabling also asks for a gradient of the embeddings, which only reentrant checkpointing needs and no other arm
    # computes.
    base.disable_input_require_grads()


def _fine_tune(model: torch.nn.Module, windows: torch.Tensor, steps: int) -> tuple[list[float], float]:
    """Train the adapters by AdamW, one window a step; return the losses and the seconds taken."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.0)
    model.train()
    losses, start = [], time.perf_counter()
    with tqdm(range(steps), desc="Fine-tuning", unit="step") as progress:
        for step in progress:
            window = windows[step % len(windows)][None]
            loss = model(input_ids=window, labels=window).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses, time.perf_counter() - start


def _print_table(measured: dict[str, dict[str, list]], *, exact: bool, bits: int, tokens: int, dtype: str) -> None:
    """Print bytes kept and step times of all arms."""
    baseline = measured["checkpointing"]
    verdict = {"plain": "-", "checkpointing": "-", "reversible": "exact" if exact else "NOT EXACT"}
    print(f"\n{tokens} tokens, {dtype}, {bits} side bits, LoRA on all linear layers")
    print(f"{'':16}{'kept by the layers':>20}{'of checkpointing':>18}{'step':>9}{'ratio':>8}   reconstruction")
    for arm in ARMS:
        values = measured[arm]
        kept = values["bytes_by_layer"][-1]
        ratio = statistics.median(a / b for a, b in zip(values["seconds"], baseline["seconds"], strict=True))
        print(
            f"{arm:16}{kept / 1e6:17.2f} MB{kept / baseline['bytes_by_layer'][-1]:18.3f}"
            f"{statistics.median(values['seconds']):7.2f} s{ratio:8.2f}   {verdict[arm]}"
        )


def _draw(
    output: Path,
    measured: dict[str, dict[str, list]],
    losses: list[float],
    *,
    held_out: tuple[float, float],
    bits: int,
    title: str,
) -> None:
    """Draw the bytes kept by depth, and the losses by step."""
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for arm in ARMS:
        kept = [n / 1e6 for n in measured[arm]["bytes_by_layer"]]
        left.plot(range(1, len(kept) + 1), kept, label=f"reversible, {bits} bits" if arm == "reversible" else arm)
    left.set(xlabel="decoder layers passed", ylabel="kept for the backward pass (MB)", yscale="log", title=title)
    left.legend()
    left.grid(alpha=0.3)
    right.plot(range(1, len(losses) + 1), losses, alpha=0.5, label="training, a window a step")
    right.plot((0, len(losses)), held_out, "o--", label="held-out windows, before and after")
    right.set(xlabel="step", ylabel="loss (nats per token)", title="reversible fine-tuning")
    right.legend()
    right.grid(alpha=0.3)
    with replacing(output) as unfinished:
        figure.savefig(unfinished, dpi=150, format="png")
    pyplot.close(figure)


def _pyplot() -> Any:
    """Import pyplot so that it needs no screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
