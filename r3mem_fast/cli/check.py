"""`r3mem demo`, `check`, `env` and `families`: show what runs on this machine, and prove that it is right."""

import argparse
import dataclasses
import json
from typing import Any

from .common import begin, device_of
from .options import add_model_options, positive


def add_demo(commands: Any) -> None:
    """Add the command `demo`."""
    demo = commands.add_parser("demo", help="fine-tune a real model reversibly, and show what that saves")
    demo.set_defaults(run=_demo)
    demo.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder or a hub id (%(default)s)")
    demo.add_argument("--text", help="a UTF-8 text file to train on (Python's help topics)")
    demo.add_argument("--tokens", type=positive, default=512, help="tokens of a window (%(default)s)")
    demo.add_argument("--steps", type=positive, default=40, help="steps of training (%(default)s)")
    demo.add_argument(
        "--remember-steps", type=positive, default=2000, help="steps at most to remember a page (%(default)s)"
    )
    demo.add_argument("--output", default="r3mem-demo.png", help="the picture (%(default)s)")
    add_model_options(demo, dtype="bfloat16")


def _demo(options: argparse.Namespace) -> int:
    begin(options, f"Loading {options.model}; all of it takes about five minutes")
    from ..demo import run_demo

    run_demo(
        model_name=options.model,
        text=options.text,
        tokens=options.tokens,
        steps=options.steps,
        remember_steps=options.remember_steps,
        dtype=options.dtype,
        bits=options.bits,
        fraction_bits=options.fraction_bits,
        device=device_of(options),
        output=options.output,
    )
    return 0


def add_check(commands: Any) -> None:
    """Add the command `check`."""
    what = "prove on a model that its inverse is exact, its gradients right, and its memories read"
    check = commands.add_parser("check", help=what)
    check.set_defaults(run=_check)
    check.add_argument("model", metavar="MODEL", help="smollm2-135m, a folder or a hub id")
    check.add_argument("--text", help="a UTF-8 text file (Python's help topics)")
    check.add_argument(
        "--tokens", type=positive, default=512, help="tokens of the text; 12 or more for memories (%(default)s)"
    )
    check.add_argument("--per-layer", action="store_true", help="report the error of every layer")
    check.add_argument("--no-gradients", action="store_true", help="do not check gradients")
    check.add_argument("--no-memories", action="store_true", help="do not check memories")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(check, dtype="float32")


def _check(options: argparse.Namespace) -> int:
    begin(options, f"Loading {options.model}")
    import torch

    from .. import (
        MemoryNotReadError,
        MomentumCoupling,
        check_gradients,
        check_inverse,
        check_memories,
        load_model,
        make_reversible,
        restore,
    )
    from ..data.text import read_text, token_windows
    from ..memory_check import LEAST_TOKENS
    from ..positions import positions_of

    if not options.no_memories and options.tokens < LEAST_TOKENS:
        raise ValueError(f"--tokens {options.tokens} are too few to check memories: {LEAST_TOKENS}, or --no-memories")
    text = read_text(options.text)
    model, tokenizer = load_model(options.model, dtype=options.dtype, device=device_of(options))
    most = positions_of(model)
    if most is not None and options.tokens > most:
        raise ValueError(f"--tokens {options.tokens} are more than the model's {most} positions")
    ids = token_windows(tokenizer, text, tokens=options.tokens, count=1).to(model.device)
    make_reversible(model, MomentumCoupling(bits=options.bits, fraction_bits=options.fraction_bits))
    inverse = check_inverse(model, ids, per_layer=options.per_layer)
    gradients = None if options.no_gradients else check_gradients(model, ids)
    # The error is zero where operators repeat their bits, and else some roundings of the dtype.
    right = gradients is None or gradients.max_relative_error <= max(1e-5, 8 * torch.finfo(model.dtype).eps)
    memories, unread = None, None
    if not options.no_memories:
        try:
            memories = check_memories(restore(model), ids)
        except MemoryNotReadError as error:  # the check is there to find this out
            unread = f"memories: NOT read: {error}"
    right = right and unread is None and (memories is None or memories.right)
    if options.json:
        report: dict[str, Any] = {"model": options.model, **dataclasses.asdict(inverse)}
        report["gradients"] = None if gradients is None else dataclasses.asdict(gradients)
        report["memories"] = unread if memories is None else dataclasses.asdict(memories)
        print(json.dumps(report))
    else:
        print(inverse)
        if options.per_layer:
            for index, layer_error in enumerate(inverse.layer_errors or ()):
                print(f"  layer {index:3}: error of the reconstructed input {layer_error:.3g}")
        for found in (gradients, memories or unread):
            if found is not None:
                print(found)
    return 0 if inverse.exact and right else 1


def add_env(commands: Any) -> None:
    """Add the command `env`."""
    env = commands.add_parser("env", help="show machine, versions and which kernels run")
    env.set_defaults(run=_env)
    env.add_argument("--json", action="store_true", help="print one JSON object")
    env.add_argument("--device", help="device that kernels are shown for: cpu, cuda, ... (a GPU if there is one)")


def _env(options: argparse.Namespace) -> int:
    from ..environment import machine, torch_settings

    report = machine()
    if not options.json:
        _print_values(report)
    report |= torch_settings()
    import torch

    from ..kernels.attention import dispatch
    from ..kernels.attention.arguments import AttentionInputs, AttentionSettings
    from ..kernels.common.dispatch import choose

    device = device_of(options)
    sample = torch.zeros(1, 1, 1, 64, device=device)
    attention = AttentionInputs(sample, sample, sample), AttentionSettings(scale=1.0)
    choices = {
        "coupling": choose(device),
        "attention of a segment": dispatch.choose(*attention),
        "attention in decoding": dispatch.choose_for_decoding(*attention),
    }
    report["kernels"] = {name: f"{choice.implementation} ({choice.why})" for name, choice in choices.items()}
    if options.json:
        print(json.dumps(report))
    else:
        _print_values({name: report[name] for name in ("cpu_capability", "threads", "gpu", "kernels")})
    return 0


def add_families(commands: Any) -> None:
    """Add the command `families`."""
    families = commands.add_parser("families", help="say which families of models can do what, by a tiny one of each")
    families.set_defaults(run=_families)
    families.add_argument(
        "names", nargs="*", metavar="NAME", help="model_type of a family (all that transformers has)"
    )
    families.add_argument("--json", action="store_true", help="print one JSON object a line")


def _families(options: argparse.Namespace) -> int:
    begin(options, "Trying families; all of them take about two minutes")
    from ..families import try_families

    failed = False
    for report in try_families(options.names):
        print(json.dumps(dataclasses.asdict(report)) if options.json else report, flush=True)
        failed = failed or not report.does_all
    return 1 if failed and options.names else 0


def _print_values(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {choice}" for key, choice in value.items())
        print(f"{name:16} {value if value is not None else '-'}", flush=True)
