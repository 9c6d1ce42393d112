"""`r3mem compress`, `expand` and `generate`: make memories, read them backward, and write on behind them."""

import argparse
import json
from typing import Any

from .common import adapter_of, begin, pipeline_of, say, texts_of
from .options import add_adapter, add_row_options, add_run_options, positive


def add_commands(commands: Any) -> None:
    """Add the commands `compress`, `expand` and `generate`."""
    compress = commands.add_parser("compress", help="compress texts of any length into a memory file")
    compress.set_defaults(run=_compress)
    add_adapter(compress, "folder of an adapter with memory tokens")
    compress.add_argument("texts", metavar="TEXT", nargs="+", help="UTF-8 text files, a row each")
    compress.add_argument(
        "--output", "-o", required=True, metavar="FILE", help="the memory file, replaced if it is there"
    )
    compress.add_argument("--memory", metavar="FILE", help="go on from this memory: rows by name, or in order")
    levels = "rows of these levels (document); the parts of a text are rows of their own"
    compress.add_argument("--levels", nargs="+", choices=["document", "paragraph", "entity"], help=levels)
    compress.add_argument("--finish", action="store_true", help="also compress a last segment that is not full")
    add_run_options(compress)

    expand = commands.add_parser("expand", help="read a memory backward: the text that it was made of")
    expand.set_defaults(run=_expand)
    add_adapter(expand, "folder of the adapter that the memory was made with")
    expand.add_argument("memory", metavar="MEMORY", help="a memory file")
    expand.add_argument("--query", help="a query that is read after the memory")
    add_row_options(expand)
    expand.add_argument(
        "--max-new-tokens", type=positive, help="tokens at most (as many as the longest context remembered)"
    )
    add_run_options(expand)

    generate = commands.add_parser("generate", help="continue a prompt, with or without a memory before it")
    generate.set_defaults(run=_generate)
    add_adapter(generate, "folder of the adapter that the memory was made with")
    generate.add_argument("prompt", metavar="PROMPT", help="what is continued, behind every row of the memory")
    generate.add_argument("--memory", metavar="FILE", help="a memory file; of several rows, each is continued")
    add_row_options(generate)
    generate.add_argument("--max-new-tokens", type=positive, default=64, help="tokens at most (%(default)s)")
    generate.add_argument("--temperature", type=float, help="sample with this temperature (greedy)")
    generate.add_argument(
        "--top-p", type=float, help="sample from the likeliest tokens that have this probability together"
    )
    generate.add_argument("--beams", type=positive, default=1, help="beams of a beam search (%(default)s)")
    generate.add_argument("--seed", type=int, default=0, help="seed of sampling (%(default)s)")
    add_run_options(generate)


def _compress(options: argparse.Namespace) -> int:
    from ..files import locked_file

    with locked_file(options.output):
        return _compress_to(options)


def _compress_to(options: argparse.Namespace) -> int:
    import time

    if not adapter_of(options)["r3mem_config"].get("num_memory_tokens"):
        raise ValueError(
            f"{options.folder} has no memory tokens, so it makes no memories; `r3mem remember --memory-tokens 16` or "
            "`r3mem train` makes an adapter that does"
        )
    begin(options, f"Loading {options.folder}")
    from .. import Memory

    # The line break that ends a file is left out, and put before what continues it.
    named = {path: text.removesuffix("\n") for path, text in texts_of(options).items()}
    if options.memory is not None:
        named = {path: f"\n{text}" for path, text in named.items()}
    texts: dict[str, str] | list[str] = named
    memory = None if options.memory is None else Memory.load(options.memory)
    if memory is not None and {label and label[1] for label in memory.labels} != named.keys():
        texts = list(named.values())  # the names are other ones: go by the order of the rows
    pipeline = pipeline_of(options, options.folder, base=options.model)
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


def _expand(options: argparse.Namespace) -> int:
    if not any(entry.get("expanded") for entry in adapter_of(options).get("remembered", [])):
        raise ValueError(
            f"{options.folder} has not learned to give back a text from its memory: what it wrote would be made up. "
            "`r3mem remember FOLDER TEXT --memory-tokens 16` makes an adapter that has"
        )
    pipeline, memory = _with_memory(options)
    queries = None if options.query is None else [options.query] * len(memory)
    texts = pipeline.expand(memory, queries, max_new_tokens=options.max_new_tokens)
    _print_rows(options, memory, [texts] if isinstance(texts, str) else texts)
    return 0


def _generate(options: argparse.Namespace) -> int:
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
        say(options, "the model wrote nothing: it ended at once. Another prompt, or --temperature, may help")
        return 1
    return 0


def _with_memory(options: argparse.Namespace) -> tuple[Any, Any]:
    """The pipeline of a folder, and the rows of the memory that are asked for; None without a memory."""
    adapter_of(options)
    begin(options, f"Loading {options.folder}")
    from .. import Memory

    wanted = (options.level, options.name) != (None, None)
    if options.memory is None:
        if wanted:
            raise ValueError("--level and --name choose rows of a memory; pass --memory")
        return pipeline_of(options, options.folder, base=options.model), None
    memory = Memory.load(options.memory)  # before the model, so that a damaged file is reported at once
    if wanted:
        try:
            memory = memory.select(options.level, options.name)
        except KeyError as error:
            raise ValueError(error.args[0]) from None
    pipeline = pipeline_of(options, options.folder, base=options.model)
    return pipeline, memory.to(pipeline.model.device)


def _print_rows(options: argparse.Namespace, memory: Any, texts: list[str]) -> None:
    labels = [None] * len(texts) if memory is None else memory.labels
    for label, text in zip(labels, texts, strict=True):
        if options.json:
            level, name = (None, None) if label is None else label
            print(json.dumps({"level": level, "name": name, "text": text}))
        else:
            if len(texts) > 1 and label is not None:
                print(f"[{label[0]}: {label[1]}]")
            print(text)
