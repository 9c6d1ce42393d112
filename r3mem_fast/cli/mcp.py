"""`r3mem mcp`: serves a store's memory to clients of the Model Context Protocol, over standard input and output."""

import argparse
from typing import Any

from .common import say, store_of
from .options import add_store, add_store_model


def add_commands(commands: Any) -> None:
    """Add the command `mcp`."""
    what = "serve a user's memory to a client of the Model Context Protocol, over standard input and output"
    mcp = commands.add_parser("mcp", help=what)
    mcp.set_defaults(run=_mcp)
    mcp.add_argument("--user", required=True, help="whose memory it is, where a call names nobody")
    add_store(mcp)
    add_store_model(mcp, json=False, sizes=True)


def _mcp(options: argparse.Namespace) -> int:
    from ..mcp_server import Opening, memory_server
    from ..store.texts import store_folder

    def opened():
        from ..integrations.quiet import quiet

        quiet()
        if options.threads is not None:
            import torch

            torch.set_num_threads(options.threads)
        return store_of(options)

    folder = store_folder(options.store)
    opening = Opening(folder, opened)
    server = memory_server(opening, options.user)
    opening.start()
    say(options, f"the memory of {options.user} in {folder}; the model is being loaded")
    server.run()
    return 0
