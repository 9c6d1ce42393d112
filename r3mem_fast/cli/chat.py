"""`r3mem chat`: a conversation in the terminal, behind what the user has said before."""

import argparse
import contextlib
import datetime
import sys
import time
from typing import TYPE_CHECKING, Any

from .common import agreed, begin, print_streamed, sampling_of, store_of
from .options import add_lookup, add_sampling, add_store, add_store_model

if TYPE_CHECKING:
    from ..store import MemoryStore

_HELP = """/memories        what is remembered, and in what form
/search WORDS    what was said about something, word for word
/forget [N]      delete the last exchange, or the last N
/forget all      delete the whole conversation
/quit            end; Ctrl-D does, too. Ctrl-C stops a reply that is being written, which is then not added"""
# Lines of earlier conversations that the arrow keys bring back.
_LINES = 500


def add_commands(commands: Any) -> None:
    """Add the command `chat`."""
    chat = commands.add_parser("chat", help="talk with a model that remembers what a user has said before")
    chat.set_defaults(run=_chat)
    chat.add_argument("user", metavar="USER", help="whose conversation goes on, or begins")
    add_store(chat)
    add_lookup(chat)
    add_sampling(chat, max_new_tokens=256)
    add_store_model(chat, json=False, sizes=True)


def _chat(options: argparse.Namespace) -> int:
    begin(options, "Loading the model")
    with store_of(options) as store:
        settings = {"passages": options.passages, "by": options.by, **sampling_of(options)}
        store.answering()  # before the first line is typed
        conversation = Conversation(store, options.user, settings)
        if sys.stdin.isatty():
            said = len(store.get_all(user_id=options.user))
            print(f"{said} items are remembered of {options.user}. /help shows what can be done.")
        conversation.run()
    return 0


class Conversation:
    """A conversation at the terminal; each exchange is added to the store.

    Args:
        store: The store.
        user: Whose conversation it is.
        settings: Arguments of `MemoryStore.reply`.
    """

    def __init__(self, store: "MemoryStore", user: str, settings: dict[str, Any]):
        self._store, self._user, self._settings = store, user, settings
        self._run = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._lines = _Lines()
        self._commands = {
            "forget": self._forget, "memories": self._memories, "search": self._search, "help": self._help,
        }  # fmt: skip

    def run(self) -> None:
        """Read lines and reply to them until the input ends."""
        self._remind()
        prompt = f"{self._user}> " if sys.stdin.isatty() else ""
        while True:
            try:
                line = input(prompt).strip()
            except EOFError:
                if prompt:
                    print()
                return
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /quit ends)")
                continue
            if line == "/quit":
                return
            if line:
                try:
                    self._take(line)
                except KeyboardInterrupt:
                    print("(stopped)")
                except (ValueError, ImportError, KeyError) as error:
                    # What was typed, too much of it, or what another process deleted: said, and on it goes.
                    print(f"({error.args[0] if isinstance(error, KeyError) else error})")

    def _take(self, line):
        if not line.startswith("/"):
            self._reply(line)
            return
        name, _, rest = line[1:].partition(" ")
        if name not in self._commands:
            raise ValueError(f"there is no command /{name}; /help shows those that there are")
        self._commands[name](rest.strip())

    def _reply(self, line):
        pieces = self._store.reply(line, user_id=self._user, stream=True, **self._settings)
        try:
            reply = print_streamed(pieces)
        except KeyboardInterrupt:
            print("(stopped; nothing was added)")
            return
        if not reply:
            raise ValueError("the model wrote nothing, and nothing was added; other words, or --temperature, may help")
        said = [{"role": "user", "content": line}, {"role": "assistant", "content": reply}]
        begun = time.time()
        try:
            self._store.add(said, user_id=self._user, run_id=self._run)
        except KeyboardInterrupt:  # while it is compressed, most likely, which is done next time
            items = self._store.get_all(user_id=self._user, run_id=self._run)
            is_kept = bool(items) and items[-1].created >= begun
            print(f"(stopped; {'both are remembered' if is_kept else 'nothing was added'})")

    def _forget(self, how):
        exchanges = how or "1"
        if exchanges != "all" and (not exchanges.isdecimal() or int(exchanges) < 1):
            raise ValueError(f"/forget takes a number, or all; got {how!r}")
        items = self._store.get_all(user_id=self._user)
        if not items:
            print("nothing is remembered")
            return
        try:
            if exchanges == "all":
                if not agreed(f"Forget all {len(items)} items of {self._user}, for good?"):
                    print("nothing was forgotten")
                    return
                gone = self._store.delete(user_id=self._user)
            else:
                # An exchange begins with what the user says.
                begins = [place for place, item in enumerate(items) if item.role == "user"][-int(exchanges) :]
                gone = self._store.delete([item.id for item in items[begins[0] if begins else 0 :]])
        finally:
            self._remind()
        print(f"{gone} items were forgotten; {len(items) - gone} are left")

    def _memories(self, _):
        items = self._store.get_all(user_id=self._user)
        history = self._store.answering().histories.history(self._user)
        memory = history.memory
        if not items:
            print("nothing is remembered")
            return
        print(f"{len(items)} items")
        if memory is None:
            print("nothing is compressed yet")
        else:
            from ..memory.slots import slots_a_head

            slots = slots_a_head(memory) + int(memory.pinned_slots()[0])
            print(f"{int(memory.tokens_seen[0])} tokens compressed into {slots} slots a head, {memory.nbytes} bytes")
        print(f"{len(history.tail)} tokens, the newest, are read as they are")

    def _search(self, query):
        found = self._store.search(query, user_id=self._user)
        for one in found:
            print(f"{one.item.role}: {one.item.text}")
        if not found:
            print("nothing was found")

    def _help(self, _):
        print(_HELP)

    def _remind(self):
        """Have the arrow keys bring back what the store holds, so that nothing comes back that was forgotten."""
        items = self._store.get_all(user_id=self._user)
        self._lines.replace([item.text for item in items if item.role == "user" and "\n" not in item.text][-_LINES:])


class _Lines:
    """Lines that the arrow keys bring back, on a terminal whose Python has readline."""

    def __init__(self):
        self._readline: Any = None
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):  # there is none on Windows: lines are typed without it
                import readline

                self._readline = readline

    def replace(self, lines):
        """Put lines in the place of all there are."""
        if self._readline is not None:
            self._readline.clear_history()
            for line in lines:
                self._readline.add_history(line)
