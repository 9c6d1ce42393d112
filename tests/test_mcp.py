"""`r3mem mcp`: its tools, called by the protocol's own client over standard input and output, on a tiny model."""

import os
import subprocess
import sys

import pytest

from r3mem_fast import MemoryStore
from r3mem_fast.cli import main
from tests.test_store_cli import DEVICE, SIZES

mcp = pytest.importorskip("mcp", reason="the extra `mcp`, which the extra `dev` has, is not installed")
anyio = pytest.importorskip("anyio")


def served(folder, place, errors, *more):
    """Parameters of a server's process, whose standard error goes into a file."""
    command = ["-m", "r3mem_fast", "mcp", "--user", "anna", "--store", str(place), "--model", str(folder)]
    parameters = mcp.StdioServerParameters(
        command=sys.executable, args=[*command, *SIZES, *DEVICE, *more], env=dict(os.environ)
    )
    return mcp.Client(mcp.stdio_client(parameters, errlog=errors))


@pytest.fixture
def run(folder, tmp_path):
    """Run a function with a client of a server of `tmp_path/store`; returns what the server printed as errors."""

    def run(function, *more):
        async def connected():
            with open(tmp_path / "errors.txt", "w+") as errors:
                async with served(folder, tmp_path / "store", errors, *more) as client:
                    await function(client)
                errors.seek(0)
                return errors.read()

        return anyio.run(connected)

    return run


async def call(client, tool, **arguments):
    """The result of a tool that must not be an error."""
    found = await client.call_tool(tool, arguments)
    assert not found.is_error, found.content
    content = found.structured_content
    return content["result"] if set(content) == {"result"} else content


async def refused(client, tool, **arguments):
    """Text of the error that a tool's result is."""
    found = await client.call_tool(tool, arguments)
    assert found.is_error
    return found.content[0].text


def test_the_tools_say_what_they_do_and_take(run):
    async def listed(client):
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"add_memory", "search_memories", "ask_memory", "list_memories", "delete_memory"}
        for tool in tools.values():
            assert tool.title and len(tool.description) > 40
            assert all(about.get("description") for about in tool.input_schema["properties"].values())
            assert "self" not in tool.input_schema["properties"] and "user_id" in tool.input_schema["properties"]
        assert tools["add_memory"].input_schema["required"] == ["text"]
        assert tools["ask_memory"].annotations.read_only_hint and tools["delete_memory"].annotations.destructive_hint

    run(listed)


def test_what_is_added_is_found_asked_for_and_deleted(run, folder, tmp_path):
    """And is what `MemoryStore` holds and answers; what a server prints goes to standard error."""

    async def used(client):
        assert await call(client, "list_memories") == []  # it does not wait for the model
        first = await call(client, "add_memory", text="Ida is allergic to peanuts.", run_id="r", metadata={"a": 1})
        assert (first["user_id"], first["role"], first["metadata"]) == ("anna", "user", {"a": 1})
        second = await call(client, "add_memory", text="I see.", role="assistant")
        await call(client, "add_memory", text="I live in Oslo.", user_id="bob")
        (found,) = await call(client, "search_memories", query="What about peanuts?")
        assert found["item"] == first and found["by"] == "bm25" and found["score"] > 0
        assert await call(client, "search_memories", query="peanuts", user_id="bob") == []
        assert await call(client, "list_memories") == [first, second]
        assert await call(client, "list_memories", run_id="r") == [first]
        assert await call(client, "list_memories", limit=1) == [second]
        answer = await call(client, "ask_memory", question="Who?", passages=0, max_new_tokens=4)
        with MemoryStore(tmp_path / "store") as store:
            assert answer == store.ask("Who?", user_id="anna", passages=0, max_new_tokens=4, do_sample=False)
        assert "1 is not one of bob" in await refused(client, "delete_memory", item_id=1, user_id="bob")
        assert "was deleted" in await call(client, "delete_memory", item_id=1)
        assert await call(client, "list_memories") == [second]
        assert "there is no item 1" in await refused(client, "delete_memory", item_id=1)
        assert "a message is empty" in await refused(client, "add_memory", text=" ")
        assert "limit" in await refused(client, "search_memories", query="x", limit=0)
        assert "text" in await refused(client, "add_memory")

    assert "the memory of anna in" in run(used)


def test_a_store_of_another_model_is_an_error_of_the_tools_that_read_it(run, folder, tmp_path):
    new = ["--store", str(tmp_path / "store"), "--model", str(folder), *SIZES, *DEVICE]
    assert main(["store", "add", "--user", "anna", "Hello.", *new]) == 0

    async def used(client):
        assert "differ in: layout" in await refused(client, "ask_memory", question="Who?")
        assert len(await call(client, "list_memories")) == 1
        assert "was deleted" in await call(client, "delete_memory", item_id=1)  # which needs no model
        assert await call(client, "list_memories") == []

    assert "differ in: layout" in run(used, "--memory-budget", "16")


def test_without_the_package_the_command_says_what_to_install(tmp_path):
    code = (
        "import sys\nsys.modules['mcp'] = None\nfrom r3mem_fast.cli import main\n"
        "assert main(['mcp', '--user', 'anna', '--store', sys.argv[1]]) == 2\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "store")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "needs the package mcp, 2.0 or newer: pip install 'r3mem_fast[mcp]'" in done.stderr and not done.stdout
