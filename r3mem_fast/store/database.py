"""`Database`: what was said, in SQLite: raw texts and metadata, an index of their words, and what is made of them.

The raw text is the truth. A memory is made of it, and made again where it is missing or behind; so what counts is that
a transaction has ended, and a process may be killed at any moment.
"""

import contextlib
import dataclasses
import json
import secrets
import sqlite3
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .items import Held, Item

FORMAT = 1
DATABASE = "store.sqlite"
_SECONDS_TO_WAIT, _SECONDS_TO_OVERWRITE = 60.0, 1.0
_SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE items (
    id INTEGER PRIMARY KEY AUTOINCREMENT, user TEXT NOT NULL, agent TEXT, run TEXT, role TEXT NOT NULL,
    text TEXT NOT NULL, metadata TEXT NOT NULL, created REAL NOT NULL
);
CREATE INDEX items_of_user ON items (user, id);
CREATE VIRTUAL TABLE words USING fts5 (text, content='items', content_rowid='id', tokenize='porter unicode61');
CREATE TRIGGER added AFTER INSERT ON items BEGIN
    INSERT INTO words (rowid, text) VALUES (new.id, new.text);
END;
CREATE TRIGGER deleted AFTER DELETE ON items BEGIN
    INSERT INTO words (words, rowid, text) VALUES ('delete', old.id, old.text);
    DELETE FROM embeddings WHERE item = old.id;
END;
CREATE TABLE embeddings (item INTEGER PRIMARY KEY, embedder TEXT NOT NULL, vector BLOB NOT NULL);
CREATE TABLE users (
    user TEXT PRIMARY KEY, revision INTEGER NOT NULL, file TEXT, item INTEGER NOT NULL DEFAULT 0,
    tokens INTEGER NOT NULL DEFAULT 0, adapter TEXT, learned INTEGER NOT NULL DEFAULT 0
);
"""


class Database:
    """Items of many users, and how far their memories have come.

    Several processes may have it open. Each change is a transaction that is on the disk when the method returns.

    Args:
        path: The file; made if it is not there, with the folders above it.
        read_only: Whether nothing is to be written, made or waited for.

    Raises:
        OSError: It cannot be opened or made; if it is only read, also where nothing has been made in it yet.
        ValueError: It is no file of a store, or a newer version's.
    """

    def __init__(self, path: Path, *, read_only: bool = False):
        self.path = path
        self._lock = threading.RLock()
        if read_only:
            with self._explained():
                self._connection = sqlite3.connect(
                    f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
                )
                if self._is_empty():  # whoever makes it has not come further, or was killed there
                    self.close()
                    raise FileNotFoundError(f"there is no store in {path.parent} yet")
                self._check_format()
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make the folder {path.parent}: {error.strerror}; choose another place") from None
        with self._explained():
            self._connection = sqlite3.connect(
                path, timeout=_SECONDS_TO_WAIT, isolation_level=None, check_same_thread=False
            )
            self._open()

    def _open(self):
        run = self._connection.execute
        self._write_ahead()
        run("PRAGMA synchronous = FULL")  # what was acknowledged outlives a loss of power, too
        run("PRAGMA secure_delete = ON")  # what was deleted is overwritten
        with self.changing():
            if self._is_empty():
                for statement in _statements(_SCHEMA):
                    run(statement)
                run(f"PRAGMA user_version = {FORMAT}")
            else:
                self._check_format()
        self._overwrite()  # a process may have been killed between deleting and this

    def _version(self):
        return self._connection.execute("PRAGMA user_version").fetchone()[0]

    def _is_empty(self):
        tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        return self._version() == 0 and tables == 0

    def _check_format(self):
        if (version := self._version()) != FORMAT:
            raise ValueError(
                f"{self.path} has format {version}, and this version of r3mem_fast reads format {FORMAT}: "
                "install the version that wrote it, or choose another folder"
            )

    @contextlib.contextmanager
    def _explained(self):
        """Say what SQLite's errors are about."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OSError(f"cannot open, read or write {self.path}: {error}") from None
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:
                raise
            raise ValueError(
                f"{self.path} is no store of r3mem_fast, or is damaged: {error}. Take it from a backup"
            ) from None

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    @contextlib.contextmanager
    def changing(self) -> Iterator[sqlite3.Connection]:
        """Make all changes in the block one transaction: a context manager.

        Yields:
            The connection.
        """
        with self._lock, self._explained():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.rollback()
                raise

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple]:
        """Run a query.

        Args:
            query: SQL.
            values: Values of its parameters.
        """
        with self._lock, self._explained():
            return self._connection.execute(query, values).fetchall()

    def setting(self, name: str) -> str | None:
        """A setting of the store; None if it was never set."""
        found = self.rows("SELECT value FROM settings WHERE name = ?", (name,))
        return found[0][0] if found else None

    def add(
        self,
        messages: Sequence[tuple[str, str]],
        *,
        user: str,
        agent: str | None,
        run: str | None,
        metadata: Mapping[str, Any] | None,
    ) -> list[Item]:
        """Add messages, all or none.

        Args:
            messages: Role and text of each.
            user: Whose they are.
            agent: Agent that they were said to.
            run: Conversation that they belong to.
            metadata: What is kept beside each, values for JSON; None: nothing.

        Raises:
            TypeError: The metadata are no values for JSON.
        """
        if not isinstance(metadata, Mapping | None):
            raise TypeError(f"metadata must be values by name, got {type(metadata).__name__}")
        try:
            described, now = json.dumps(dict(metadata or {}), sort_keys=True), time.time()
        except (TypeError, ValueError) as error:
            raise TypeError(f"metadata must be values for JSON: {error}") from None
        ids: list[int] = []
        with self.changing() as connection:
            connection.execute(
                "INSERT INTO users (user, revision) VALUES (?, ?) ON CONFLICT DO NOTHING", (user, _revision())
            )
            for role, text in messages:
                values = (user, agent, run, role, text, described, now)
                cursor = connection.execute(
                    "INSERT INTO items (user, agent, run, role, text, metadata, created) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    values,
                )
                ids.append(int(cursor.lastrowid or 0))
        return [
            Item(number, user, agent, run, role, text, json.loads(described), now)
            for number, (role, text) in zip(ids, messages, strict=True)
        ]

    def items(self, where: str = "1", values: Sequence[Any] = (), *, more: str = "") -> list[Item]:
        """Items that fit a condition, in the order in which they were added.

        Args:
            where: Condition in SQL.
            values: Values of its parameters.
            more: What follows the condition in place of the order, in SQL.
        """
        columns = "id, user, agent, run, role, text, metadata, created"
        found = self.rows(f"SELECT {columns} FROM items WHERE {where} {more or 'ORDER BY id'}", values)
        return [
            Item(number, user, agent, run, role, text, json.loads(metadata), created)
            for number, user, agent, run, role, text, metadata, created in found
        ]

    def held(self, user: str) -> Held:
        """How far a user's memory has come."""
        columns = ", ".join(field.name for field in dataclasses.fields(Held))
        found = self.rows(f"SELECT {columns} FROM users WHERE user = ?", (user,))
        return Held(*found[0]) if found else Held()

    def advance(self, user: str, before: Held, after: Held, made_with: str | None = None) -> bool:
        """Put a memory in the place of an earlier one, if nothing has changed since that was read.

        Args:
            user: Whose memory it is.
            before: What the new memory was made from.
            after: The new memory.
            made_with: Value of the setting of this name that the store must have, so that no memory of other settings
                comes in while another process makes all of them anew; None: any.

        Returns:
            Whether it was put there. If not, another process has changed the memory, or something was deleted.
        """
        with self.changing() as connection:
            changed = connection.execute(
                "UPDATE users SET file = ?, item = ?, tokens = ? WHERE user = ? AND revision = ? AND file IS ? "
                "AND ifnull(? = (SELECT value FROM settings WHERE name = 'made_with'), ?)",
                (
                    after.file,
                    after.item,
                    after.tokens,
                    user,
                    before.revision,
                    before.file,
                    made_with,
                    made_with is None,
                ),
            )
            return changed.rowcount == 1

    def put_adapters(self, user: str, before: Held, adapters: str, learned: int) -> bool:
        """Name a user's adapters, if nothing was deleted since those before were read; see `advance`.

        Args:
            user: Whose adapters they are.
            before: What was read before there were new ones.
            adapters: Names of their folders, with spaces between them.
            learned: Last item that they have learned.
        """
        with self.changing() as connection:
            changed = connection.execute(
                "UPDATE users SET adapter = ?, learned = ? WHERE user = ? AND revision = ? AND adapter IS ?",
                (adapters, learned, user, before.revision, before.adapter),
            )
            return changed.rowcount == 1

    def delete(self, where: str, values: Sequence[Any]) -> list[Item]:
        """Delete items, and forget the memories and adapters that were made of them, in one transaction.

        Args:
            where: Condition in SQL.
            values: Values of its parameters.

        Returns:
            The items that are gone.
        """
        with self.changing() as connection:
            gone = self.items(where, values)
            connection.executemany("DELETE FROM items WHERE id = ?", [(item.id,) for item in gone])
            first_of: dict[str, int] = {}
            for item in gone:  # in the order of their numbers
                first_of.setdefault(item.user_id, item.id)
            for user, first in first_of.items():
                held = self.held(user)
                kept = (held.file, held.item, held.tokens) if first > held.item else (None, 0, 0)
                left = held.without(first)
                connection.execute(
                    "UPDATE users SET revision = ?, file = ?, item = ?, tokens = ?, adapter = ?, learned = ? "
                    "WHERE user = ?",
                    (_revision(), *kept, left.adapter, left.learned, user),
                )
                if not self.rows("SELECT 1 FROM items WHERE user = ? LIMIT 1", (user,)):
                    connection.execute("DELETE FROM users WHERE user = ?", (user,))
            if gone:  # so that the index holds their words no longer
                connection.execute("INSERT INTO words (words) VALUES ('optimize')")
        if gone and self._overwrite():
            warnings.warn(
                f"somebody is reading {self.path}, so that what was deleted is still in SQLite's log beside it; it is "
                "overwritten when something else is deleted, or when the store is opened next",
                stacklevel=2,
            )
        return gone

    def _write_ahead(self):
        """Choose a write-ahead log. SQLite does not wait here for another process that makes the file."""
        end = time.monotonic() + _SECONDS_TO_WAIT
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def _overwrite(self):
        """Move what was written into the file, so that nothing deleted is in the log; whether that must wait.

        Another program that reads, as a backup does, may do so for long: it is not waited for.
        """
        with self._lock, self._explained():
            self._wait_at_most(_SECONDS_TO_OVERWRITE)
            try:
                return bool(self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])
            finally:
                self._wait_at_most(_SECONDS_TO_WAIT)

    def _wait_at_most(self, seconds):
        """Wait so long for what other connections hold."""
        self._connection.execute(f"PRAGMA busy_timeout = {int(1000 * seconds)}")

    def forget_memories(self, settings: dict[str, str], user: str | None = None) -> None:
        """Forget memories and adapters, which are made again, and take over other settings.

        Args:
            settings: The settings.
            user: Whose are forgotten; None: all, and only then settings may differ.
        """
        with self.changing() as connection:
            connection.execute(
                "UPDATE users SET revision = ?1, file = NULL, item = 0, tokens = 0, adapter = NULL, learned = 0 "
                "WHERE ?2 IS NULL OR user = ?2",
                (_revision(), user),
            )
            connection.executemany("INSERT OR REPLACE INTO settings VALUES (?, ?)", list(settings.items()))

    def put_settings(self, settings: dict[str, str], *, anew: bool = False, if_empty: bool = False) -> None:
        """Take over settings.

        Args:
            settings: The settings.
            anew: Whether they take the place of those that are there; if not, another process may have set them.
            if_empty: Whether to do so only if the store holds no item.
        """
        how = "REPLACE" if anew else "IGNORE"
        with self.changing() as connection:
            if if_empty and connection.execute("SELECT 1 FROM items LIMIT 1").fetchone():
                return
            connection.executemany(f"INSERT OR {how} INTO settings VALUES (?, ?)", list(settings.items()))


def _revision():
    return secrets.randbits(62)


def _statements(script):
    """The statements of a script, in each of which a trigger is whole."""
    statement = ""
    for line in script.strip().splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
