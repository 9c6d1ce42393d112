"""Tell a store something, end, and ask about it in another process, as an application would.

python examples/chat_with_memory.py anna "My daughter Ida is allergic to peanuts."
python examples/chat_with_memory.py anna "What must Ida not eat?"      # some seconds on two CPU cores
"""

import argparse

from r3mem_fast import MemoryStore


def main(arguments=None):
    """Reply to a message behind what was said before, and add both; returns the reply."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("user", help="whose conversation goes on, or begins")
    parser.add_argument("message", help="what the user says")
    parser.add_argument("--store", default="memories", help="folder of the conversations (%(default)s)")
    parser.add_argument("--model", help="a folder or hub id (what the store was made with)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of the reply (%(default)s)")
    parser.add_argument(
        "--passages", type=int, default=3, help="items that stand before it, word for word (%(default)s)"
    )
    options = parser.parse_args(arguments)

    with MemoryStore(options.store, options.model) as store:
        print(f"{len(store.get_all(user_id=options.user))} items are remembered of {options.user}")
        settings = {"passages": options.passages, "max_new_tokens": options.max_new_tokens, "do_sample": False}
        reply = ""
        for piece in store.reply(options.message, user_id=options.user, stream=True, **settings):
            print(piece, end="", flush=True)
            reply += piece
        print()
        said = [{"role": "user", "content": options.message}]
        if reply.strip():
            said.append({"role": "assistant", "content": reply.strip()})
        store.add(said, user_id=options.user)
    return reply


if __name__ == "__main__":
    main()
