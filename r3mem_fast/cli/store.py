"""`r3mem store`: adds to a store of conversations, asks it, looks things up, and deletes them."""

import argparse
import dataclasses
import json
import sys
import time
from typing import Any

from ..training.settings import RememberSettings
from .common import agreed, begin, print_streamed, sampling_of, say, store_of
from .options import (
    add_lookup,
    add_sampling,
    add_settings,
    add_store,
    add_store_model,
    add_way,
    given_settings,
    positive,
)


def add_commands(commands: Any) -> None:
    """Add the command `store` with its own commands."""
    store = commands.add_parser("store", help="keep conversations in a folder, and ask about them")
    verbs = store.add_subparsers(dest="verb", required=True, metavar="VERB")

    add = _verb(verbs, "add", _add, "add what was said to a user's conversation")
    add.add_argument("words", metavar="TEXT", nargs="*", help="what the user said, a message each")
    messages = 'JSON of messages [{"role": "user" or "assistant", "content": "..."}, ...]; - for standard input'
    add.add_argument("--messages", metavar="FILE", help=messages)
    add.add_argument("--user", required=True, help="whose conversation it is")
    _add_places(add, "that it was said to", "that it belongs to")
    add.add_argument("--metadata", type=_mapping, metavar="JSON", help="an object that is kept beside each message")
    add_store_model(add, sizes=True)

    ask = _verb(verbs, "ask", _ask, "answer questions behind what a user has said; nothing is added")
    ask.add_argument("words", metavar="QUESTION", nargs="+", help="questions; each is answered alone")
    ask.add_argument("--user", required=True, help="whose conversation it is")
    add_lookup(ask)
    add_sampling(ask, max_new_tokens=128)
    add_store_model(ask)

    search = _verb(verbs, "search", _search, "look up what was said, word for word; by words it needs no model")
    search.add_argument("words", metavar="WORD", nargs="+", help="what is looked for")
    search.add_argument("--user", required=True, help="whose conversation it is")
    _add_places(search, "that it was said to (any)", "that it belongs to (any)")
    search.add_argument("--limit", type=positive, default=5, help="items at most (%(default)s)")
    add_way(search)
    add_store_model(search)

    items = _verb(verbs, "list", _list, "show what was said; needs no model")
    _add_choice(items)
    items.add_argument("--json", action="store_true", help="print one JSON object a line")

    delete = _verb(verbs, "delete", _delete, "delete what was said, and all that was made of it; needs no model")
    delete.add_argument("--item", type=int, help="number of an item")
    _add_choice(delete)
    delete.add_argument("--yes", action="store_true", help="do not ask, on a terminal, whether to")

    rebuild = _verb(verbs, "rebuild", _rebuild, "make memories anew from the texts, of this model and these sizes")
    rebuild.add_argument("--user", help="whose memory (all, also those of another model or other sizes)")
    add_store_model(rebuild, json=False, sizes=True)

    consolidate = _verb(verbs, "consolidate", _consolidate, "teach an adapter what a user has said; takes minutes")
    consolidate.add_argument("--user", required=True, help="whose conversation it is")
    add_settings(consolidate, RememberSettings)
    add_store_model(consolidate, json=False)


def _verb(verbs, name, run, what):
    parser = verbs.add_parser(name, help=what)
    parser.set_defaults(run=run)
    add_store(parser)
    return parser


def _add_places(parser, agent, run):
    parser.add_argument("--agent", help=f"agent {agent}")
    parser.add_argument("--run", dest="run_id", help=f"conversation {run}")


def _add_choice(parser):
    parser.add_argument("--user", help="only this user's")
    _add_places(parser, "that it was said to (any)", "that it belongs to (any)")


def _mapping(text):
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return found


def _add(options: argparse.Namespace) -> int:
    messages = [{"role": "user", "content": text} for text in options.words]
    if options.messages is not None:
        messages += _messages(options.messages)
    if not messages:
        raise ValueError("nothing to add: give texts, or --messages FILE")
    begin(options, "Loading the model")
    with store_of(options) as store:
        added = store.add(
            messages,
            user_id=options.user,
            agent_id=options.agent,
            run_id=options.run_id,
            metadata=options.metadata,
        )
    if options.json:
        _print_items(added, as_json=True)
    else:
        print(f"added {_items(len(added))} to the conversation of {options.user}")
    return 0


def _messages(path: str) -> list[Any]:
    """Messages of a JSON file, or of standard input."""
    from pathlib import Path

    try:
        # With the mark that some editors on Windows begin a file with.
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8-sig")
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON of messages in UTF-8: {error}") from None
    return found if isinstance(found, list) else [found]


def _ask(options: argparse.Namespace) -> int:
    _texts(options).database.close()  # before the model, so that a folder without a store is reported at once
    begin(options, "Loading the model")
    settings = {"user_id": options.user, "passages": options.passages, "by": options.by, **sampling_of(options)}
    with store_of(options) as store:
        if sys.stdout.isatty() and not options.json:
            answers = [print_streamed(store.ask(question, stream=True, **settings)) for question in options.words]
        else:
            answers = store.ask(options.words, **settings)
            for question, answer in zip(options.words, answers, strict=True):
                print(json.dumps({"question": question, "answer": answer}) if options.json else answer)
    if not all(answer.strip() for answer in answers):
        say(options, "the model wrote nothing: it ended at once. Other words, or --temperature, may help")
        return 1
    return 0


def _search(options: argparse.Namespace) -> int:
    wanted = {
        "user_id": options.user, "agent_id": options.agent, "run_id": options.run_id, "limit": options.limit,
    }  # fmt: skip
    query = " ".join(options.words)
    with _texts(options) as texts:
        if options.by == "bm25":
            found = texts.search(query, **wanted)
        else:
            begin(options, "Loading the model")
            with store_of(options) as store:
                found = store.search(query, by=options.by, **wanted)
    _print_items([one.item for one in found], as_json=options.json, scores=[(one.score, one.by) for one in found])
    if not found:
        say(options, f"nothing that {options.user} has said was found for {query!r}")
    return 0 if found else 1


def _list(options: argparse.Namespace) -> int:
    with _texts(options) as texts:
        _print_items(texts.items(**_chosen(options)), as_json=options.json)
    return 0


def _delete(options: argparse.Namespace) -> int:
    chosen = {"item_id": options.item, **_chosen(options)}
    if all(value is None for value in chosen.values()):
        raise ValueError("say what is to be deleted: --item, --user, --agent or --run")
    with _texts(options) as texts:
        items = texts.items(**chosen)
    if not items:
        say(options, "there is nothing of that kind; `r3mem store list` shows what there is")
        return 1
    if sys.stdin.isatty() and not options.yes:
        _print_items(items[:3], as_json=False)
        more = f" ({len(items) - 3} more)" if len(items) > 3 else ""
        if not agreed(f"Delete {_items(len(items))}{more}, for good?"):
            print("nothing was deleted")
            return 1
    from .. import MemoryStore
    from ..integrations.quiet import quiet
    from ..store.texts import store_folder

    quiet()
    with MemoryStore(store_folder(options.store)) as store:
        gone = store.delete(**{name: value for name, value in chosen.items() if value is not None})
    print(f"deleted {_items(gone)}")
    return 0


def _rebuild(options: argparse.Namespace) -> int:
    _texts(options).database.close()
    begin(options, "Loading the model")
    with store_of(options) as store:
        store.rebuild(options.user)
        users = store.users() if options.user is None else [options.user]
    print(f"memories made anew: {', '.join(users) or 'there are none'}")
    return 0


def _consolidate(options: argparse.Namespace) -> int:
    settings = RememberSettings(**given_settings(options, RememberSettings))
    _texts(options).database.close()
    begin(options, "Loading the model")
    with store_of(options) as store:
        report = store.consolidate(user_id=options.user, settings=settings)
    print(report)
    return 0 if all(report.exact) and not report.lost else 1


def _texts(options):
    from ..store.texts import StoredTexts, store_folder

    return StoredTexts(store_folder(options.store))


def _chosen(options):
    return {"user_id": options.user, "agent_id": options.agent, "run_id": options.run_id}


def _items(count):
    return f"{count} item{'' if count == 1 else 's'}"


def _print_items(items, *, as_json, scores=None):
    """Print items, a line each, with how well they fit where they were looked up."""
    for place, item in enumerate(items):
        if as_json:
            found = {} if scores is None else {"score": scores[place][0], "by": scores[place][1]}
            print(json.dumps({**dataclasses.asdict(item), **found}))
            continue
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(item.created))
        where = "".join(
            f" {name}={value}" for name, value in (("run", item.run_id), ("agent", item.agent_id)) if value
        )
        print(f"{item.id:6}  {when}  {item.user_id}{where}  {item.role}: {item.text}")
