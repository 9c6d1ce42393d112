"""The `r3mem` command."""

import argparse
import contextlib
import dataclasses
import json
import sys
import warnings

from . import __version__

_OF_MEMORIES = ("segment_length", "segment_overlap", "memory_segments", "memory_placement", "adapter_rows")
# Options of a new adapter, and what R3MemConfig calls them.
_OF_NEW_ADAPTERS = {
    "core": "core",
    "backward": "backward",
    "lora_r": "lora_r",
    "first_adapted_layer": "first_adapted_layer",
    "memory_tokens": "num_memory_tokens",
    "segment_length": "segment_length",
    "segment_overlap": "segment_overlap",
    "memory_segments": "max_memory_segments",
    "memory_placement": "memory_placement",
    "adapter_rows": "adapter_rows",
}
# How an adapter that is made by `train` is trained.
_OF_TRAINING = {
    "distillation": "distillation_weight",
    "memory_dropout": "memory_dropout",
    "bptt_segments": "bptt_segments",
    "kept_segments": "kept_segments",
}


def main(arguments=None):
    """Run the command; returns its exit status.

    0: done. 1: what was asked for was done, and a check failed, or nothing came of it. 2: the request cannot be met;
    the message says what to do. 130: interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        with _plain_warnings():
            return options.run(options)
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        if options.debug:
            raise
        _say(options, str(error))
        return 2
    except KeyboardInterrupt:
        folder = getattr(options, "trained_folder", None)
        what = None if folder is None else _interrupted_run(folder)
        _say(options, f"interrupted. {what}" if what else "interrupted")
        return 130


def _say(options, text):
    """A line for the person at the terminal, beside what the command prints."""
    print(f"r3mem {options.command}: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _plain_warnings():
    """Show warnings as lines of the command's own, without the place in the source that gave them."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *place, **more: print(f"Note: {message}", file=sys.stderr, flush=True)
        yield


def _begin(options, what):
    """The first line, before torch and transformers are imported, which takes some seconds; then their settings."""
    print(f"{what} ...", file=sys.stderr, flush=True)
    from .integrations.quiet import quiet

    quiet()
    if getattr(options, "threads", None) is not None:
        import torch

        torch.set_num_threads(options.threads)


def _interrupted_run(folder):
    from .manifest import interrupted_run

    return interrupted_run(folder)


def _parser():
    parser = argparse.ArgumentParser(prog="r3mem", description="Reversible memory networks from language models.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"r3mem_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="fine-tune a real model reversibly, and show what that saves")
    demo.set_defaults(run=_demo)
    demo.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder or a hub id (%(default)s)")
    demo.add_argument("--text", help="a UTF-8 text file to train on (Python's help topics)")
    demo.add_argument("--tokens", type=_positive, default=512, help="in a window (%(default)s)")
    demo.add_argument("--steps", type=_positive, default=40, help="of training (%(default)s)")
    demo.add_argument("--remember-steps", type=_positive, default=2000, help="at most, for the page (%(default)s)")
    demo.add_argument("--output", default="r3mem-demo.png", help="the picture (%(default)s)")
    _add_model_options(demo, dtype="bfloat16")

    what = "prove on a model that its inverse is exact, its gradients right, and its memories read"
    check = commands.add_parser("check", help=what)
    check.set_defaults(run=_check)
    check.add_argument("model", metavar="MODEL", help="smollm2-135m, a folder or a hub id")
    check.add_argument("--text", help="a UTF-8 text file (Python's help topics)")
    check.add_argument(
        "--tokens", type=_positive, default=512, help="of the text; 12 or more for memories (%(default)s)"
    )
    check.add_argument("--per-layer", action="store_true", help="report the error of every layer")
    check.add_argument("--no-gradients", action="store_true", help="do not check gradients")
    check.add_argument("--no-memories", action="store_true", help="do not check memories")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    _add_model_options(check, dtype="float32")

    _add_remember(commands)
    _add_train(commands)
    _add_memories(commands)

    env = commands.add_parser("env", help="show machine, versions and which kernels run")
    env.set_defaults(run=_env)
    env.add_argument("--json", action="store_true", help="print one JSON object")
    env.add_argument("--device", help="whose kernels: cpu, cuda, ... (a GPU if there is one)")
    parser.epilog = (
        "R3MEM_CACHE: the folder of the embedded model. R3MEM_MAX_STEPS: a limit of training steps, to try commands "
        "out. R3MEM_KERNELS, R3MEM_ATTENTION: reference or triton."
    )
    return parser


def _add_remember(commands):
    remember = commands.add_parser("remember", help="fine-tune texts into an adapter until they come back exactly")
    remember.set_defaults(run=_remember)
    remember.add_argument("folder", metavar="FOLDER", help="of the adapter; made, or added to, or resumed")
    remember.add_argument("texts", metavar="TEXT", nargs="+", help="UTF-8 text files, a document each")
    remember.add_argument("--model", help="base: a folder or hub id (smollm2-135m, or where FOLDER's was)")
    remember.add_argument("--core", type=_core, help="layers FIRST,END that are read backward, or all")
    remember.add_argument("--backward", choices=["reversed", "inverse"], help="of a new adapter (reversed)")
    _add_new_adapter_options(remember, memory_tokens="none")
    remember.add_argument("--max-steps", type=_positive, default=2000, help="of training (%(default)s)")
    remember.add_argument("--learning-rate", type=float, default=1.5e-3, help="(%(default)s)")
    seconds = "between checkpoints in FOLDER (%(default)s)"
    remember.add_argument("--checkpoint-seconds", type=float, default=30.0, metavar="SECONDS", help=seconds)
    remember.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    remember.add_argument("--questions", metavar="MODEL", help="let this instruct model write the queries")
    _add_run_options(remember)

    recall = commands.add_parser("recall", help="give back what was remembered for a query")
    recall.set_defaults(run=_recall)
    _add_adapter(recall, "of the adapter")
    recall.add_argument("queries", metavar="QUERY", nargs="+", help="as `r3mem inspect` shows them")
    recall.add_argument("--max-new-tokens", type=_positive, help="of a context (the longest one remembered)")
    _add_run_options(recall)

    inspect = commands.add_parser("inspect", help="show what an adapter folder or a memory file holds")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("path", metavar="PATH", help="the folder or hub id of an adapter, or a memory file")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")


def _add_new_adapter_options(parser, memory_tokens):
    parser.add_argument("--lora-r", type=_positive, help="rank of a new adapter (16)")
    first = "layers from this one on are adapted (all if there are memory tokens, else from the core on)"
    parser.add_argument("--first-adapted-layer", type=int, metavar="LAYER", help=first)
    parser.add_argument("--memory-tokens", type=int, help=f"of a new adapter; 0: none ({memory_tokens})")
    parser.add_argument("--segment-length", type=_positive, help="of its segments, in tokens (256)")
    parser.add_argument("--segment-overlap", type=int, help="tokens before a segment that are read with it (0)")
    parser.add_argument("--memory-segments", type=_positive, help="of which the memory is kept (1)")
    parser.add_argument("--memory-placement", choices=["every_layer", "input"], help="of its memories (every_layer)")
    parser.add_argument("--adapter-rows", choices=["all", "memory"], help="that it changes, reading forward (all)")


def _add_train(commands):
    train = commands.add_parser("train", help="train an adapter to make memories of long texts, and to read them")
    train.set_defaults(run=_train)
    data = "a UTF-8 text, a .jsonl file, or a folder of the datasets library"
    train.add_argument("texts", metavar="DATA", nargs="+", help=data)
    train.add_argument("--output", "-o", required=True, metavar="FOLDER", help="of the adapter; made, or resumed")
    train.add_argument("--model", help="a folder or hub id, or the folder of an adapter (smollm2-135m)")
    train.add_argument("--base", help="of an adapter that is trained on: its base model (where it was)")
    train.add_argument("--column", default="text", help="of the texts in a .jsonl file or folder (%(default)s)")
    _add_new_adapter_options(train, memory_tokens=16)
    train.add_argument("--distillation", type=float, help="weight of the base model with full context, 0 to 1 (0)")
    train.add_argument("--memory-dropout", type=float, help="share of segments read without their memory (0)")
    train.add_argument("--bptt-segments", type=int, help="through which gradients pass at most (all)")
    train.add_argument("--kept-segments", choices=["none", "device", "host"], help="until the backward pass (none)")
    train.add_argument("--segments", type=_positive, default=3, help="of a window (%(default)s)")
    steps = "of training (%(default)s: an hour or two on two CPU cores for the embedded model)"
    train.add_argument("--steps", type=_positive, default=1000, help=steps)
    train.add_argument("--batch-size", type=_positive, default=1, help="windows a pass (%(default)s)")
    train.add_argument("--accumulate", type=_positive, default=1, help="passes a step (%(default)s)")
    train.add_argument("--learning-rate", type=float, default=1e-3, help="(%(default)s)")
    train.add_argument("--hold-out", type=float, default=0.0, help="share at the end of each text (%(default)s)")
    dtypes = ["bfloat16", "float32"]
    train.add_argument("--adapter-dtype", choices=dtypes, help="of the adapter's files (as trained, float32)")
    train.add_argument("--checkpoint-steps", type=_positive, default=50, help="(%(default)s)")
    train.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    _add_run_options(train)


def _add_memories(commands):
    compress = commands.add_parser("compress", help="compress texts of any length into a memory file")
    compress.set_defaults(run=_compress)
    _add_adapter(compress, "of an adapter with memory tokens")
    compress.add_argument("texts", metavar="TEXT", nargs="+", help="UTF-8 text files, a row each")
    compress.add_argument(
        "--output", "-o", required=True, metavar="FILE", help="the memory file, replaced if it is there"
    )
    compress.add_argument("--memory", metavar="FILE", help="go on from this memory: rows by name, or in order")
    levels = "rows of these levels (document); the parts of a text are rows of their own"
    compress.add_argument("--levels", nargs="+", choices=["document", "paragraph", "entity"], help=levels)
    compress.add_argument("--finish", action="store_true", help="also compress a last segment that is not full")
    _add_run_options(compress)

    expand = commands.add_parser("expand", help="read a memory backward: the text that it was made of")
    expand.set_defaults(run=_expand)
    _add_adapter(expand, "of the adapter that the memory was made with")
    expand.add_argument("memory", metavar="MEMORY", help="a memory file")
    expand.add_argument("--query", help="read after the memory")
    _add_row_options(expand)
    expand.add_argument("--max-new-tokens", type=_positive, help="(as many as the longest context remembered)")
    _add_run_options(expand)

    generate = commands.add_parser("generate", help="continue a prompt, with or without a memory before it")
    generate.set_defaults(run=_generate)
    _add_adapter(generate, "of the adapter that the memory was made with")
    generate.add_argument("prompt", metavar="PROMPT", help="what is continued, behind every row of the memory")
    generate.add_argument("--memory", metavar="FILE", help="a memory file; of several rows, each is continued")
    _add_row_options(generate)
    generate.add_argument("--max-new-tokens", type=_positive, default=64, help="(%(default)s)")
    generate.add_argument("--temperature", type=float, help="sample with this temperature (greedy)")
    generate.add_argument(
        "--top-p", type=float, help="of the tokens that are sampled from, their probability together"
    )
    generate.add_argument("--beams", type=_positive, default=1, help="(%(default)s)")
    generate.add_argument("--seed", type=int, default=0, help="of sampling (%(default)s)")
    _add_run_options(generate)


def _add_adapter(parser, folder):
    parser.add_argument("folder", metavar="FOLDER", help=f"{folder}; or its hub id")
    parser.add_argument("--model", help="its base model: a folder or hub id (where it was when the adapter was made)")


def _add_row_options(parser):
    parser.add_argument("--level", choices=["document", "paragraph", "entity"], help="only rows of this level")
    parser.add_argument("--name", help="only the row of this name, see `r3mem inspect`")


def _add_run_options(parser):
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of the weights (the adapter's; the fastest that fits)",
    )
    _add_machine_options(parser)


def _add_machine_options(parser):
    parser.add_argument("--device", help="cpu, cuda, ... (a GPU if there is one)")
    parser.add_argument("--threads", type=_positive, help="of torch on the CPU; 1 on a busy machine (one a core)")


def _add_model_options(parser, dtype):
    parser.add_argument(
        "--dtype", default=dtype, choices=["bfloat16", "float16", "float32"], help="of the weights (%(default)s)"
    )
    parser.add_argument("--bits", type=int, default=4, choices=[1, 2, 4, 8], help="side bits (%(default)s)")
    parser.add_argument(
        "--fraction-bits", type=_fraction_bits, default=14, help="of the streams, a number or auto (%(default)s)"
    )
    _add_machine_options(parser)


def _demo(options):
    _begin(options, f"Loading {options.model}; all of it takes about five minutes")
    from .demo import run_demo

    run_demo(
        model_name=options.model,
        text=options.text,
        tokens=options.tokens,
        steps=options.steps,
        remember_steps=options.remember_steps,
        dtype=options.dtype,
        bits=options.bits,
        fraction_bits=options.fraction_bits,
        device=_device(options),
        output=options.output,
    )
    return 0


def _check(options):
    _begin(options, f"Loading {options.model}")
    import torch

    from . import (
        MemoryNotReadError,
        MomentumCoupling,
        check_gradients,
        check_inverse,
        check_memories,
        load_model,
        make_reversible,
        restore,
    )
    from .text import read_text, token_windows

    text = read_text(options.text)
    model, tokenizer = load_model(options.model, dtype=options.dtype, device=_device(options))
    ids = token_windows(tokenizer, text, tokens=options.tokens, count=1).to(model.device)
    make_reversible(model, MomentumCoupling(bits=options.bits, fraction_bits=options.fraction_bits))
    inverse = check_inverse(model, ids, per_layer=options.per_layer)
    gradients = None if options.no_gradients else check_gradients(model, ids)
    # Zero where operators repeat their bits; else some roundings of the dtype.
    right = gradients is None or gradients.max_relative_error <= max(1e-5, 8 * torch.finfo(model.dtype).eps)
    memories, unread = None, None
    if not options.no_memories:
        try:
            memories = check_memories(restore(model), ids)
        except MemoryNotReadError as error:  # which is what was to be found out
            unread = f"memories: NOT read: {error}"
    right = right and unread is None and (memories is None or memories.right)
    if options.json:
        report = {"model": options.model, **dataclasses.asdict(inverse)}
        report["gradients"] = None if gradients is None else dataclasses.asdict(gradients)
        report["memories"] = unread if memories is None else dataclasses.asdict(memories)
        print(json.dumps(report))
    else:
        print(inverse)
        if options.per_layer:
            for index, error in enumerate(inverse.layer_errors):
                print(f"  layer {index:3}: error of the reconstructed input {error:.3g}")
        for report in (gradients, memories or unread):
            if report is not None:
                print(report)
    return 0 if inverse.exact and right else 1


def _remember(options):
    from .files import locked

    # Before anything is loaded: another process that writes there, or a folder that cannot be written to.
    with locked(options.folder):
        options.trained_folder = options.folder
        return _remember_in(options)


def _remember_in(options):
    from .manifest import is_adapter

    existing = is_adapter(options.folder)
    given = {name: value for name in _OF_NEW_ADAPTERS if (value := getattr(options, name)) is not None}
    if existing and given:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} is for a new adapter; {options.folder} has one")
    if not given.get("memory_tokens") and (useless := [name for name in _OF_MEMORIES if name in given]):
        raise ValueError(f"--{useless[0].replace('_', '-')} is for adapters with --memory-tokens")
    texts = _texts(options)
    model = options.folder if existing else options.model or "smollm2-135m"
    _begin(options, f"Loading {model}")
    from . import R3MemConfig, RememberSettings

    settings = RememberSettings(
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        checkpoint_seconds=options.checkpoint_seconds,
        seed=options.seed,
    )
    if existing:
        pipeline = _pipeline(options, model, base=options.model)
    else:
        config = R3MemConfig(**{_OF_NEW_ADAPTERS[name]: value for name, value in given.items()})
        pipeline = _pipeline(options, model, config=config, seed=options.seed)
    report = pipeline.remember(
        texts,
        folder=options.folder,
        settings=settings,
        builder=_builder(options),
        progress=not options.json,
    )
    if options.json:
        levels = {level: {"exact": exact, "total": total} for level, (exact, total) in report.by_level().items()}
        print(
            json.dumps(
                {
                    "exact_match": report.exact_match,
                    "levels": levels,
                    "expanded": None if report.expanded is None else sum(report.expanded),
                    "lost": report.lost,
                    "steps": report.steps,
                    "seconds": report.seconds,
                }
            )
        )
    else:
        print(report)
        print(f"Ask with: r3mem recall {options.folder} {report.pairs[0].query!r}")
    return 0 if all(report.exact) and all(report.expanded or [True]) and not report.lost else 1


def _train(options):
    from .files import locked

    with locked(options.output):
        options.trained_folder = options.output
        return _train_in(options)


def _train_in(options):
    model = options.model or "smollm2-135m"
    _begin(options, f"Loading {model}")
    import torch

    from . import R3MemConfig, TrainSettings, storage
    from .training.texts import read_texts

    texts = [text for path in options.texts for text in read_texts(path, options.column)]
    settings = TrainSettings(
        steps=options.steps,
        segments=options.segments,
        batch_size=options.batch_size,
        accumulate=options.accumulate,
        learning_rate=options.learning_rate,
        held_out=options.hold_out,
        checkpoint_steps=options.checkpoint_steps,
        seed=options.seed,
    )
    named = {**_OF_NEW_ADAPTERS, **_OF_TRAINING}
    given = {named[name]: value for name in named if (value := getattr(options, name, None)) is not None}
    if storage.adapter_named(model) is not None:
        if fixed := [name for name in _OF_NEW_ADAPTERS if getattr(options, name, None) is not None]:
            raise ValueError(f"{model} is an adapter, in which --{fixed[0].replace('_', '-')} is fixed already")
        pipeline = _pipeline(options, model, base=options.base)
        network = pipeline.model
        network.r3mem_config = dataclasses.replace(network.r3mem_config, **given)
    else:
        if options.memory_tokens == 0 and (
            useless := [n for n in (*_OF_MEMORIES, *_OF_TRAINING) if named[n] in given]
        ):
            raise ValueError(f"--{useless[0].replace('_', '-')} is for adapters with memory tokens")
        config = R3MemConfig(**{"num_memory_tokens": 16, **given})
        pipeline = _pipeline(options, model, base=options.base, config=config, seed=options.seed)
    dtype = None if options.adapter_dtype is None else getattr(torch, options.adapter_dtype)
    report = pipeline.train(
        texts, folder=options.output, settings=settings, adapter_dtype=dtype, progress=not options.json
    )
    if options.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        print(report)
        print(f"Make a memory with: r3mem compress {options.output} TEXT -o FILE")
    return 0


def _texts(options):
    from pathlib import Path

    from .text import read_text

    if len({Path(path).resolve() for path in options.texts}) < len(options.texts):
        raise ValueError("a text is named twice")
    return {path: read_text(path) for path in options.texts}


def _builder(options):
    if options.questions is None:
        return None
    from . import load_model
    from .hierarchy import InstructBuilder

    return InstructBuilder(*load_model(options.questions, device=_device(options)))


def _pipeline(options, model, **settings):
    from . import R3MemPipeline

    return R3MemPipeline(model, device=_device(options), dtype=options.dtype, **settings)


def _adapter(options):
    """`r3mem.json` of the adapter that is asked for, before anything that takes long is loaded."""
    from .hub import is_path
    from .manifest import adapter_folder, read_manifest

    folder = adapter_folder(options.folder)
    if not folder.exists() and not is_path(options.folder) and "/" in options.folder:
        print(f"Looking for {options.folder} on the hub ...", file=sys.stderr, flush=True)
        from . import storage

        folder = storage.find(options.folder)
    return read_manifest(folder)


def _recall(options):
    remembered = _adapter(options).get("remembered")
    if not remembered:
        raise ValueError(
            f"{options.folder} remembers nothing that could be recalled: it was not made by `r3mem remember`. "
            f"`r3mem remember FOLDER TEXT` makes one that does"
        )
    _begin(options, f"Loading {options.folder}")
    pipeline = _pipeline(options, options.folder, base=options.model)
    texts = pipeline.recall(options.queries, max_new_tokens=options.max_new_tokens)
    for query, text in zip(options.queries, texts, strict=True):
        if options.json:
            print(json.dumps({"query": query, "context": text}))
        else:
            nothing = f"(nothing is remembered for {query!r}; `r3mem inspect` shows the queries)"
            print(text if text.strip() else nothing)
    if not any(entry["exact"] for entry in remembered):
        _say(options, "none of its contexts was learned to the last token: do not rely on what comes back")
        return 1
    return 0 if all(text.strip() for text in texts) else 1


def _compress(options):
    from .files import locked_file

    with locked_file(options.output):
        return _compress_to(options)


def _compress_to(options):
    import time

    if not _adapter(options)["r3mem_config"].get("num_memory_tokens"):
        raise ValueError(
            f"{options.folder} has no memory tokens, so it makes no memories; `r3mem remember --memory-tokens 16` or "
            "`r3mem train` makes an adapter that does"
        )
    _begin(options, f"Loading {options.folder}")
    from . import Memory

    # The line break that ends a file stands between it and what goes on from there.
    texts = {path: text.removesuffix("\n") for path, text in _texts(options).items()}
    if options.memory is not None:
        texts = {path: f"\n{text}" for path, text in texts.items()}
    memory = None if options.memory is None else Memory.load(options.memory)
    if memory is not None and {label and label[1] for label in memory.labels} != texts.keys():
        texts = list(texts.values())  # of other names: in the order of the rows
    pipeline = _pipeline(options, options.folder, base=options.model)
    started = time.perf_counter()
    memory = pipeline.compress(
        texts,
        memory=None if memory is None else memory.to(pipeline.model.device),
        levels=options.levels or ("document",),
        finish=options.finish,
        progress=not options.json,
    )
    seconds = time.perf_counter() - started
    memory.save(options.output)
    report = {"rows": len(memory), "segments": memory.num_segments.tolist(), "tokens": memory.tokens_seen.tolist()}
    report |= {"bytes": memory.nbytes, "seconds": round(seconds, 2)}
    if options.json:
        print(json.dumps(report))
    else:
        print(f"{options.output}: {sum(report['tokens'])} tokens in {len(memory)} rows, {memory.nbytes} bytes")
    return 0


def _expand(options):
    if not any(entry.get("expanded") for entry in _adapter(options).get("remembered", [])):
        raise ValueError(
            f"{options.folder} has not learned to give back a text from its memory: what it wrote would be made up. "
            "`r3mem remember FOLDER TEXT --memory-tokens 16` makes an adapter that has"
        )
    pipeline, memory = _with_memory(options)
    queries = None if options.query is None else [options.query] * len(memory)
    texts = pipeline.expand(memory, queries, max_new_tokens=options.max_new_tokens)
    _print_rows(options, memory, [texts] if isinstance(texts, str) else texts)
    return 0


def _generate(options):
    import torch

    pipeline, memory = _with_memory(options)
    torch.manual_seed(options.seed)
    settings = {"do_sample": options.temperature is not None or options.top_p is not None}
    settings |= {name: v for name in ("temperature", "top_p") if (v := getattr(options, name)) is not None}
    texts = pipeline.generate(
        [options.prompt] * (1 if memory is None else len(memory)),
        memory=memory,
        max_new_tokens=options.max_new_tokens,
        num_beams=options.beams,
        **settings,
    )
    _print_rows(options, memory, texts)
    if not all(text.strip() for text in texts):
        _say(options, "the model wrote nothing: it ended at once. Another prompt, or --temperature, may help")
        return 1
    return 0


def _with_memory(options):
    """The pipeline of a folder, and the rows of the memory that are asked for."""
    _adapter(options)
    _begin(options, f"Loading {options.folder}")
    from . import Memory

    wanted = (options.level, options.name) != (None, None)
    if options.memory is None:
        if wanted:
            raise ValueError("--level and --name choose rows of a memory; pass --memory")
        return _pipeline(options, options.folder, base=options.model), None
    memory = Memory.load(options.memory)  # a damaged file is told before a model is loaded
    if wanted:
        try:
            memory = memory.select(options.level, options.name)
        except KeyError as error:
            raise ValueError(error.args[0]) from None
    pipeline = _pipeline(options, options.folder, base=options.model)
    return pipeline, memory.to(pipeline.model.device)


def _print_rows(options, memory, texts):
    labels = [None] * len(texts) if memory is None else memory.labels
    for label, text in zip(labels, texts, strict=True):
        if options.json:
            level, name = (None, None) if label is None else label
            print(json.dumps({"level": level, "name": name, "text": text}))
        else:
            if len(texts) > 1 and label is not None:
                print(f"[{label[0]}: {label[1]}]")
            print(text)


def _inspect(options):
    from .manifest import adapter_folder, interrupted_run, is_adapter

    path = adapter_folder(options.path)
    if path.is_file():
        return _inspect_memory(options)
    run = interrupted_run(path)
    if run and not is_adapter(path):
        print(json.dumps({"interrupted": run}) if options.json else f"no adapter yet. {run}")
        return 0
    options.folder = options.path
    manifest = _adapter(options)
    if options.json:
        print(json.dumps({**manifest, **({"interrupted": run} if run else {})}))
        return 0
    if run:
        print(run)
    config = manifest["r3mem_config"]
    first, end = config["core"]
    print(f"adapter for {manifest['base_model']} (fingerprint {manifest['base_fingerprint']})")
    print(f"backward: {config['backward']}, core: layers {first} to {end - 1}, LoRA rank {config['lora_r']}")
    if config.get("num_memory_tokens"):
        print(
            f"memories: {config['num_memory_tokens']} tokens a segment of {config['segment_length']}"
            f"{_overlap(config)}, "
            f"{config['memory_placement']}, adapters on {config['adapter_rows']} rows"
        )
    for entry in manifest.get("remembered", []):
        mark = "exact" if entry["exact"] else "NOT exact"
        if entry.get("expanded") is not None:
            mark += ", from its memory too" if entry["expanded"] else ", NOT from its memory"
        print(f"{entry['document']}  {entry['level']:9}  {entry['tokens']:5} tokens  {mark:9}  {entry['query']}")
    return 0


def _overlap(settings):
    overlap = settings.get("segment_overlap")
    return f" and the {overlap} before it" if overlap else ""


def _inspect_memory(options):
    from .memory_file import read_header

    header = read_header(options.path)
    rows, layout, origin = header.rows, header.metadata["layout"], header.metadata["origin"]
    if options.json:
        described = {"bytes": header.nbytes, "dtype": header.dtype, "layout": layout, "origin": origin, "rows": rows}
        print(json.dumps(described))
        return 0
    print(f"memory of {len(rows)} rows, {header.nbytes} bytes, {header.dtype}, whole")
    print(
        f"{layout['num_memory_tokens']} tokens a segment of {layout['segment_length']}{_overlap(layout)}, "
        f"{layout['placement']}; "
        f"of {layout['readable_segments']} segments at most"
    )
    print(
        f"made with base model {origin['base']}, adapters {origin['adapter']}, tokenizer {origin['tokenizer'] or '-'}"
    )
    for row in rows:
        label = f"{row['level']:9}  {row['name']}" if row["level"] else "(no label)"
        print(f"{row['tokens']:8} tokens  {row['segments']:5} segments  {row['unfinished']:4} unfinished  {label}")
    return 0


def _env(options):
    from .environment import machine, torch_settings

    report = machine()
    if not options.json:
        _print_values(report)
    report |= torch_settings()
    import torch

    from .kernels.attention import dispatch
    from .kernels.common.dispatch import choose

    device = _device(options)
    sample = torch.zeros(1, 1, 1, 64, device=device)
    settings = {"window": None, "softcap": None, "query_offset": 0}
    choices = {
        "coupling": choose(device),
        "attention of a segment": dispatch.choose(sample, sample, None, None, None, None, **settings),
        "attention in decoding": dispatch.choose_for_decoding(sample),
    }
    report["kernels"] = {name: f"{choice.implementation} ({choice.why})" for name, choice in choices.items()}
    if options.json:
        print(json.dumps(report))
    else:
        _print_values({name: report[name] for name in ("cpu_capability", "threads", "gpu", "kernels")})
    return 0


def _print_values(values):
    for name, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {choice}" for key, choice in value.items())
        print(f"{name:16} {value if value is not None else '-'}", flush=True)


def _device(options):
    import torch

    if options.device is not None:
        from .devices import as_device

        return as_device(options.device)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _core(text):
    if text == "all":
        return text
    try:
        first, end = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be FIRST,END or all, got {text!r}") from None
    return first, end


def _fraction_bits(text):
    return text if text == "auto" else int(text)


if __name__ == "__main__":
    sys.exit(main())
