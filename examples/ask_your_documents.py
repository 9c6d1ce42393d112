"""Ask questions about text files. Each file is read once: later questions are answered behind its memory, in a folder.

python examples/ask_your_documents.py "When is the mill open?" mill.txt town.txt
"""

import argparse
from pathlib import Path

from r3mem_fast import DocumentStore


def main(arguments=None):
    """Answer a question, and print which documents the answer is from; returns the answer's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", help="what is asked")
    parser.add_argument("documents", type=Path, nargs="+", help="UTF-8 text files")
    parser.add_argument("--store", default="documents", help="folder of the memories (%(default)s)")
    parser.add_argument("--model", default="smollm2-135m", help="a folder or hub id (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of the answer (%(default)s)")
    options = parser.parse_args(arguments)

    store = DocumentStore(options.store, options.model)
    settings = {"max_new_tokens": options.max_new_tokens, "do_sample": False}
    answer = store.answer(options.question, options.documents, **settings)
    print(answer.text)
    print("from:", ", ".join(map(str, answer.sources)))
    return answer.text


if __name__ == "__main__":
    main()
