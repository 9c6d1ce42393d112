"""`r3mem compress`, `refine`, `expand`, `generate`: make memories, better ones, read them backward, and write on."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ..choices import LEVELS
from ..config import R3MemConfig
from ..store.defaults import OF_MATCHED
from ..training.settings import RefineSettings
from .common import adapter_of, begin, pipeline_of, sampling_of, say, texts_of
from .options import (
    add_adapter,
    add_row_options,
    add_run_options,
    add_sampling,
    add_settings,
    given_settings,
    option_of,
    positive,
)

# What settings of matched memories are if one of them is chosen.
_MATCHED = {"num_memory_tokens": 64, "memory_budget": 256, "segment_length": 256, "segment_overlap": 32}
_MODEL = "a folder or hub id; of an adapter: its base model (smollm2-135m; where it was when the adapter was made)"


def add_commands(commands: Any) -> None:
    """Add the commands `compress`, `refine`, `expand` and `generate`."""
    compress = commands.add_parser("compress", help="compress texts of any length into a memory file")
    compress.set_defaults(run=_compress)
    what = (
        "UTF-8 text files, a row each; before them the FOLDER of an adapter, or its hub id, whose memories are learned"
    )
    compress.add_argument("words", metavar="TEXT", nargs="+", help=what)
    compress.add_argument("--model", help=_MODEL)
    compress.add_argument(
        "--output", "-o", required=True, metavar="FILE", help="the memory file, replaced if it is there"
    )
    compress.add_argument("--memory", metavar="FILE", help="go on from this memory: rows by name, or in order")
    levels = "rows of these levels (document); the parts of a text are rows of their own"
    compress.add_argument("--levels", nargs="+", choices=LEVELS, help=levels)
    add_settings(compress, R3MemConfig, OF_MATCHED, defaults=_MATCHED)
    chat = "the texts stand in a user's turn, in which `generate` asks its prompt (for models that chat)"
    compress.add_argument("--chat", action="store_true", help=chat)
    compress.add_argument(
        "--finish", action="store_true", help="the text has ended: also compress a last segment that is not full"
    )
    add_run_options(compress)

    refine = commands.add_parser("refine", help="tune a memory to its own text, so that it answers more as that does")
    refine.set_defaults(run=_refine)
    what = "the texts that the memory was made of, rows by name, or in order; before them the FOLDER of its adapter"
    refine.add_argument("words", metavar="TEXT", nargs="+", help=what)
    refine.add_argument("--memory", required=True, metavar="FILE", help="the memory")
    refine.add_argument("--model", help=_MODEL)
    refine.add_argument(
        "--output", "-o", required=True, metavar="FILE", help="the refined memory; FILE.part, if interrupted"
    )
    add_settings(refine, RefineSettings)
    add_run_options(refine)

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
    what = "what is continued, behind every row of the memory; before it the FOLDER of an adapter, or its hub id"
    generate.add_argument("words", metavar="PROMPT", nargs="+", help=what)
    generate.add_argument("--model", help=_MODEL)
    generate.add_argument("--memory", metavar="FILE", help="a memory file; of several rows, each is continued")
    add_row_options(generate)
    chat = "the prompt stands in a user's turn, and is answered (if the text of the memory does, too)"
    generate.add_argument("--chat", action="store_true", default=None, help=chat)
    add_sampling(generate, max_new_tokens=64)
    generate.add_argument("--beams", type=positive, default=1, help="beams of a beam search (%(default)s)")
    add_run_options(generate)


def _compress(options: argparse.Namespace) -> int:
    from ..files import locked_file

    _name_folder(options)
    with locked_file(options.output):
        _refuse_other(options.output)
        return _compress_to(options)


def _refuse_other(output: str) -> None:
    """Raise FileExistsError for a file that is no memory, such as a text that was to be read (`-o *.txt`)."""
    from ..memory.file import read_header

    if not os.path.exists(output) or not os.path.getsize(output):
        return
    try:
        read_header(output)
    except ValueError:
        raise FileExistsError(
            f"{output} is there, and holds no memory that could be replaced; name another file, or delete it first"
        ) from None


def _name_folder(options: argparse.Namespace) -> None:
    """Tell texts from the adapter that may be named before them: a word that is no file."""
    _refuse_adapter_alone(options.words, "the texts")
    first, *others = options.words
    ending = os.path.splitext(first)[1]
    if others and ending and ending == os.path.splitext(others[0])[1] and not os.path.exists(first):
        raise FileNotFoundError(f"there is no file {first}")  # nor an adapter of such a name, on the hub neither
    options.folder, options.texts = (first, others) if others and not os.path.isfile(first) else (None, options.words)


def _compress_to(options: argparse.Namespace) -> int:
    import time

    _begin(options)
    from .. import Memory

    # The line break that ends a file is left out, and put before what continues it.
    named = {path: text.removesuffix("\n") for path, text in texts_of(options).items()}
    if options.memory is not None:
        named = {path: f"\n{text}" for path, text in named.items()}
    sizes = {} if options.folder is None else _sizes_for_anchors(options)
    memory = None if options.memory is None else Memory.load(options.memory)
    texts = named if memory is None else _for_rows(named, memory)
    pipeline = _pipeline(options, _config(options))
    started = time.perf_counter()
    memory = pipeline.compress(
        texts,
        memory=None if memory is None else memory.to(pipeline.model.device),
        levels=options.levels or ("document",),
        finish=options.finish,
        chat=options.chat,
        progress=not options.json,
        **sizes,
    )
    seconds = time.perf_counter() - started
    memory.save(options.output)
    report = {"rows": len(memory), "segments": memory.num_segments.tolist(), "tokens": memory.tokens_seen.tolist()}
    report |= {"bytes": memory.nbytes, "seconds": round(seconds, 2)}
    if options.json:
        print(json.dumps(report))
    else:
        print(f"{options.output}: {sum(report['tokens'])} tokens in {len(memory)} rows, {memory.nbytes} bytes")
        if memory.layout.waits and not options.finish:
            print(f"all slots are held until the text has ended (--finish), and then {memory.layout.budget} at most")
    return 0


def _refine(options: argparse.Namespace) -> int:
    from ..files import locked_file

    _name_folder(options)
    with locked_file(options.output):
        _refuse_other(options.output)
        return _refine_to(options)


def _refine_to(options: argparse.Namespace) -> int:
    settings = RefineSettings(**given_settings(options, RefineSettings))
    options.level = options.name = None
    named = {path: text.removesuffix("\n") for path, text in texts_of(options).items()}
    pipeline, memory = _with_memory(options)
    texts, unfinished = _for_rows(named, memory), Path(f"{options.output}.part")
    report = pipeline.refine(memory, texts, settings, checkpoint=unfinished, progress=not options.json)
    report.memory.save(options.output)
    unfinished.unlink(missing_ok=True)
    if options.json:
        found = {"losses": report.losses, "continued": report.continued}
        print(json.dumps({"rows": len(memory), "steps": report.steps, **found}))
    else:
        print(f"{options.output}: {report}")
    return 0


def _for_rows(named: dict[str, str], memory: Any) -> dict[str, str] | list[str]:
    """Texts for the rows of a memory: by name, or, where the rows have other names, in order."""
    return named if {label and label[1] for label in memory.labels} == named.keys() else list(named.values())


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
    _refuse_adapter_alone(options.words, "the prompt")
    if len(options.words) > 2:
        raise ValueError(f"one prompt, and the folder of an adapter before it: got {options.words}; quote the prompt")
    options.folder, options.prompt = [None, *options.words][-2:]
    pipeline, memory = _with_memory(options)
    texts = pipeline.generate(
        [options.prompt] * (1 if memory is None else len(memory)),
        memory=memory,
        chat=options.chat,
        num_beams=options.beams,
        **sampling_of(options),
    )
    _print_rows(options, memory, texts)
    if not all(text.strip() for text in texts):
        say(options, "the model wrote nothing: it ended at once. Another prompt, or --temperature, may help")
        return 1
    return 0


def _refuse_adapter_alone(words: list[str], what: str) -> None:
    from ..manifest import is_adapter

    if len(words) == 1 and (is_adapter(words[0]) or os.path.isdir(words[0])):
        raise ValueError(f"{words[0]} is the folder of an adapter or a model: {what} must follow it")


def _config(options: argparse.Namespace) -> R3MemConfig | None:
    """Settings of matched memories, if some are asked for; None for the defaults, or the settings of an adapter."""
    given = given_settings(options, R3MemConfig, OF_MATCHED)
    if not given:
        return None
    if options.memory is not None:
        raise ValueError(f"{options.memory} goes on in its own size: leave out the options of sizes")
    if given.get("num_memory_tokens") == 0:
        raise ValueError("--memory-tokens must be at least 1 here")
    if options.folder is not None:
        return None  # see _sizes_for_anchors
    slots = given.get("num_memory_tokens", _MATCHED["num_memory_tokens"])
    defaults = {**_MATCHED, "memory_budget": max(slots, _MATCHED["memory_budget"])}
    return R3MemConfig(memory_writer="matched", adapter_rows="memory", **{**defaults, **given})


def _sizes_for_anchors(options: argparse.Namespace) -> dict[str, int]:
    """Sizes that are asked of an adapter's memories: those of anchors have the one that is asked for."""
    given = given_settings(options, R3MemConfig, OF_MATCHED)
    if not given:
        return {}
    sizes = {"num_memory_tokens": "memory_tokens", "memory_budget": "memory_budget"}
    wrong = next((name for name in given if name not in sizes), None)
    if adapter_of(options)["r3mem_config"].get("memory_writer") != "anchored":
        wrong = next(iter(given))
    if wrong is not None:
        raise ValueError(
            f"{options.folder} was made for memories of its own: leave out {option_of(wrong)}. Adapters of anchors "
            "take --memory-tokens and --memory-budget, others neither"
        )
    return {sizes[name]: value for name, value in given.items()}


def _begin(options: argparse.Namespace) -> None:
    """Say what is loaded, once the adapter that is asked for is known to be there."""
    if options.folder is not None:
        adapter_of(options)
    begin(options, f"Loading {_model(options)}")


def _model(options: argparse.Namespace) -> str:
    return options.folder or options.model or "smollm2-135m"


def _pipeline(options: argparse.Namespace, config: R3MemConfig | None = None) -> Any:
    """The pipeline of an adapter with its base model, or of a model alone, with settings."""
    others: dict[str, Any] = {"config": config} if options.folder is None else {"base": options.model}
    return pipeline_of(options, _model(options), **others)


def _with_memory(options: argparse.Namespace) -> tuple[Any, Any]:
    """The pipeline of a folder, and the rows of the memory that are asked for; None without a memory."""
    _begin(options)
    from .. import Memory

    wanted = (options.level, options.name) != (None, None)
    if options.memory is None:
        if wanted:
            raise ValueError("--level and --name choose rows of a memory; pass --memory")
        return _pipeline(options), None
    memory = Memory.load(options.memory)  # before the model, so that a damaged file is reported at once
    if wanted:
        try:
            memory = memory.select(options.level, options.name)
        except KeyError as error:
            raise ValueError(error.args[0]) from None
    pipeline = _pipeline(options)
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
