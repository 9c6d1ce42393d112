"""The `r3mem` command."""

import argparse
import dataclasses
import json
import sys


def main(arguments=None):
    """Run the command; returns its exit status: 0, 1 for a check that failed, 2 for a request that cannot be met."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        if options.debug:
            raise
        print(f"r3mem {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"r3mem {options.command}: interrupted", file=sys.stderr)
        return 130


def _parser():
    parser = argparse.ArgumentParser(prog="r3mem", description="Reversible memory networks from language models.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="fine-tune a real model reversibly, and show what that saves")
    demo.set_defaults(run=_demo)
    demo.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder or a hub id (%(default)s)")
    demo.add_argument("--text", help="a UTF-8 text file to train on (Python's help topics)")
    demo.add_argument("--tokens", type=_positive, default=512, help="in a window (%(default)s)")
    demo.add_argument("--steps", type=_positive, default=40, help="of training (%(default)s)")
    demo.add_argument("--output", default="r3mem-demo.png", help="the picture (%(default)s)")
    _add_model_options(demo, dtype="bfloat16")

    check = commands.add_parser("check", help="prove on a model that its inverse is exact and its gradients right")
    check.set_defaults(run=_check)
    check.add_argument("model", metavar="MODEL", help="smollm2-135m, a folder or a hub id")
    check.add_argument("--text", help="a UTF-8 text file (Python's help topics)")
    check.add_argument("--tokens", type=_positive, default=512, help="of the text (%(default)s)")
    check.add_argument("--per-layer", action="store_true", help="report the error of every layer")
    check.add_argument("--no-gradients", action="store_true", help="check the inverse only")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    _add_model_options(check, dtype="float32")

    env = commands.add_parser("env", help="show machine, versions and which kernels run")
    env.set_defaults(run=_env)
    env.add_argument("--json", action="store_true", help="print one JSON object")
    env.add_argument("--device", help="whose kernels: cpu, cuda, ... (a GPU if there is one)")
    return parser


def _add_model_options(parser, dtype):
    parser.add_argument(
        "--dtype", default=dtype, choices=["bfloat16", "float16", "float32"], help="of the weights (%(default)s)"
    )
    parser.add_argument("--bits", type=int, default=4, choices=[1, 2, 4, 8], help="side bits (%(default)s)")
    parser.add_argument(
        "--fraction-bits", type=_fraction_bits, default=14, help="of the streams, a number or auto (%(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (a GPU if there is one)")


def _demo(options):
    from .demo import run_demo

    run_demo(
        model_name=options.model,
        text=options.text,
        tokens=options.tokens,
        steps=options.steps,
        dtype=options.dtype,
        bits=options.bits,
        fraction_bits=options.fraction_bits,
        device=_device(options),
        output=options.output,
    )
    return 0


def _check(options):
    import torch

    from . import MomentumCoupling, check_gradients, check_inverse, load_model, make_reversible
    from .text import read_text, token_windows

    text = read_text(options.text)
    model, tokenizer = load_model(options.model, dtype=getattr(torch, options.dtype))
    device = _device(options)
    ids = token_windows(tokenizer, text, tokens=options.tokens, count=1).to(device)
    make_reversible(model.to(device), MomentumCoupling(bits=options.bits, fraction_bits=options.fraction_bits))
    inverse = check_inverse(model, ids, per_layer=options.per_layer)
    gradients = None if options.no_gradients else check_gradients(model, ids)
    # Zero where operators repeat their bits; else some roundings of the dtype.
    right = gradients is None or gradients.max_relative_error <= max(1e-5, 8 * torch.finfo(model.dtype).eps)
    if options.json:
        report = {"model": options.model, **dataclasses.asdict(inverse)}
        report["gradients"] = None if gradients is None else dataclasses.asdict(gradients)
        print(json.dumps(report))
    else:
        print(inverse)
        if options.per_layer:
            for index, error in enumerate(inverse.layer_errors):
                print(f"  layer {index:3}: error of the reconstructed input {error:.3g}")
        if gradients is not None:
            print(gradients)
    return 0 if inverse.exact and right else 1


def _env(options):
    from .environment import environment
    from .kernels.common.dispatch import choose

    report = environment()
    choice = choose(_device(options))
    report["kernels"] = {"coupling": f"{choice.implementation} ({choice.why})"}
    if options.json:
        print(json.dumps(report))
        return 0
    for name, value in report.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {choice}" for key, choice in value.items())
        print(f"{name:16} {value if value is not None else '-'}")
    return 0


def _device(options):
    import torch

    if options.device is not None:
        return torch.device(options.device)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _fraction_bits(text):
    return text if text == "auto" else int(text)


if __name__ == "__main__":
    sys.exit(main())
