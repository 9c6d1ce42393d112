"""`r3mem remember`, `recall` and `inspect`: put texts into an adapter, and get them back."""

import argparse
import json
from typing import Any

from ..config import R3MemConfig
from ..training.settings import RememberSettings
from .common import adapter_of, begin, device_of, pipeline_of, say, texts_of
from .options import (
    NEW_ADAPTER,
    OF_MEMORIES,
    add_adapter,
    add_run_options,
    add_settings,
    given_settings,
    option_of,
    positive,
)


def add_commands(commands: Any) -> None:
    """Add the commands `remember`, `recall` and `inspect`."""
    remember = commands.add_parser("remember", help="fine-tune texts into an adapter until they come back exactly")
    remember.set_defaults(run=_remember)
    remember.add_argument("folder", metavar="FOLDER", help="folder of the adapter; made, or added to, or resumed")
    remember.add_argument("texts", metavar="TEXT", nargs="+", help="UTF-8 text files, a document each")
    remember.add_argument(
        "--apart", action="store_true", help="an adapter for each document, in FOLDER: none disturbs another"
    )
    remember.add_argument("--model", help="base: a folder or hub id (smollm2-135m, or where FOLDER's was)")
    add_settings(remember, R3MemConfig, NEW_ADAPTER, defaults={"num_memory_tokens": "none"})
    add_settings(remember, RememberSettings)
    remember.add_argument("--questions", metavar="MODEL", help="let this instruct model write the queries")
    add_run_options(remember)

    recall = commands.add_parser("recall", help="give back what was remembered for a query")
    recall.set_defaults(run=_recall)
    add_adapter(recall, "folder of the adapter")
    recall.add_argument("queries", metavar="QUERY", nargs="+", help="queries, as `r3mem inspect` shows them")
    recall.add_argument(
        "--max-new-tokens", type=positive, help="tokens of a context at most (as many as the longest one remembered)"
    )
    add_run_options(recall)

    inspect = commands.add_parser("inspect", help="show what an adapter folder or a memory file holds")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("path", metavar="PATH", help="the folder or hub id of an adapter, or a memory file")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")


def _remember(options: argparse.Namespace) -> int:
    from ..files import locked

    # Locked before anything is loaded, so that a folder that cannot be written to is reported at once.
    with locked(options.folder):
        options.trained_folder = options.folder
        return _remember_in(options)


def _remember_in(options: argparse.Namespace) -> int:
    from ..manifest import is_adapter, is_shelf

    if is_shelf(options.folder) and not options.apart:
        raise ValueError(f"{options.folder} holds an adapter for each document: add to it with --apart")
    existing = is_adapter(options.folder)
    given = given_settings(options, R3MemConfig, NEW_ADAPTER)
    settings = RememberSettings(**given_settings(options, RememberSettings))
    if existing and given:
        raise ValueError(f"{option_of(next(iter(given)))} is for a new adapter; {options.folder} has one")
    if not given.get("num_memory_tokens") and (useless := [name for name in OF_MEMORIES if name in given]):
        raise ValueError(f"{option_of(useless[0])} is for adapters with --memory-tokens")
    texts = texts_of(options)
    if options.apart:
        return _remember_apart(options, texts, R3MemConfig(**given) if given else None, settings)
    model = options.folder if existing else options.model or "smollm2-135m"
    begin(options, f"Loading {model}")
    if existing:
        pipeline = pipeline_of(options, model, base=options.model)
    else:
        pipeline = pipeline_of(options, model, config=R3MemConfig(**given), seed=settings.seed)
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


def _remember_apart(
    options: argparse.Namespace, texts: Any, config: R3MemConfig | None, settings: RememberSettings
) -> int:
    """Give each document an adapter of its own."""
    begin(options, f"Loading {options.model or 'the model'}")
    from .. import AdapterShelf

    shelf = AdapterShelf(
        options.folder,
        options.model,
        config=config,
        seed=settings.seed,
        device=device_of(options),
        dtype=options.dtype,
    )
    reports = shelf.remember(texts, settings=settings, builder=_builder(options), progress=not options.json)
    for name, report in reports.items():
        if options.json:
            print(json.dumps({"document": name, "exact_match": report.exact_match, "steps": report.steps,
                              "seconds": report.seconds}))  # fmt: skip
        else:
            print(f"{name}: {report}")
    entries = shelf.entries()
    if not options.json:
        print(f"Ask with: r3mem recall {options.folder} {entries[-1]['query']!r}")
    return 0 if all(entry["exact"] for entry in entries if entry.get("part_of", entry["document"]) in texts) else 1


def _builder(options: argparse.Namespace) -> Any:
    if options.questions is None:
        return None
    from .. import load_model
    from ..hierarchy import InstructBuilder

    return InstructBuilder(*load_model(options.questions, device=device_of(options)))


def _recall(options: argparse.Namespace) -> int:
    from ..manifest import adapters_in, read_manifest

    # Before anything that takes long is loaded.
    shelved = [entry for path in adapters_in(options.folder) for entry in read_manifest(path)["remembered"]]
    remembered = shelved or adapter_of(options).get("remembered")
    if not remembered:
        raise ValueError(
            f"{options.folder} remembers nothing that could be recalled: it was not made by `r3mem remember`. "
            f"`r3mem remember FOLDER TEXT` makes one that does"
        )
    begin(options, f"Loading {options.folder}")
    if shelved:
        from .. import AdapterShelf

        pipeline: Any = AdapterShelf(options.folder, options.model, device=device_of(options), dtype=options.dtype)
    else:
        pipeline = pipeline_of(options, options.folder, base=options.model)
    texts = pipeline.recall(options.queries, max_new_tokens=options.max_new_tokens)
    for query, text in zip(options.queries, texts, strict=True):
        if options.json:
            print(json.dumps({"query": query, "context": text}))
        else:
            nothing = f"(nothing is remembered for {query!r}; `r3mem inspect` shows the queries)"
            print(text if text.strip() else nothing)
    if not any(entry["exact"] for entry in remembered):
        say(options, "none of its contexts was learned to the last token: do not rely on what comes back")
        return 1
    return 0 if all(text.strip() for text in texts) else 1


def _inspect(options: argparse.Namespace) -> int:
    from ..manifest import adapters_in, folder_of_adapter, interrupted_run, is_adapter

    path = folder_of_adapter(options.path)
    if path.is_file():
        return _inspect_memory(options)
    if shelved := adapters_in(path):
        return max(_inspect(argparse.Namespace(**{**vars(options), "path": str(one)})) for one in shelved)
    run = interrupted_run(path)
    if run and not is_adapter(path):
        print(json.dumps({"interrupted": run}) if options.json else f"no adapter yet. {run}")
        return 0
    options.folder = options.path
    manifest = adapter_of(options)
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


def _overlap(settings: dict[str, Any]) -> str:
    overlap = settings.get("segment_overlap")
    return f" and the {overlap} before it" if overlap else ""


def _inspect_memory(options: argparse.Namespace) -> int:
    from ..memory.file import read_header

    header = read_header(options.path)
    rows, layout, origin = header.rows, header.metadata["layout"], header.metadata["origin"]
    if options.json:
        described = {"bytes": header.nbytes, "dtype": header.dtype, "layout": layout, "origin": origin, "rows": rows}
        print(json.dumps(described))
        return 0
    print(f"memory of {len(rows)} rows, {header.nbytes} bytes, {header.dtype}, whole")
    matched = layout.get("writer") == "matched"
    segment = f"a segment of {layout['segment_length']}{_overlap(layout)}"
    if matched:
        ended = " when a text has ended" if layout["beyond_budget"] == "rematch_once" else ""
        print(
            f"matched to queries: {layout.get('queries', 'own')}; {layout['num_memory_tokens']} slots {segment}, "
            f"{layout['budget']} at most{ended}, beyond which: {layout['beyond_budget']}; "
            f"{layout.get('allocation', 'uniform')} allocation"
        )
    else:
        print(
            f"{layout['num_memory_tokens']} tokens {segment}, {layout['placement']}; "
            f"of {layout['readable_segments']} segments at most"
        )
    made_by = "its layout" if matched else "adapters"
    print(
        f"made with base model {origin['base']}, {made_by} {origin['adapter']}, tokenizer {origin['tokenizer'] or '-'}"
    )
    for row in rows:
        label = f"{row['level']:9}  {row['name']}" if row["level"] else "(no label)"
        if matched:
            refined = f", refined in {row['refined']} steps" if row["refined"] else ""
            label = f"{row['slots']:4} slots, {row['pinned']} pinned{refined}  {label}"
        print(f"{row['tokens']:8} tokens  {row['segments']:5} segments  {row['unfinished']:4} unfinished  {label}")
    return 0
