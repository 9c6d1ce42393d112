"""Compress a book into a memory of fixed size, save it, and write on behind it.

python examples/compress_book.py book.txt "The house was"    # about a thousand tokens a second on two CPU cores
"""

import argparse
from pathlib import Path

from r3mem_fast import Memory, R3MemPipeline


def main(arguments=None):
    """Compress, save, load, and generate with the memory and without it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("book", type=Path, help="a UTF-8 text file, of any length")
    parser.add_argument("prompt", help="what is continued")
    parser.add_argument("--model", default="smollm2-135m", help="or an adapter, smollm2-135m-anchors (%(default)s)")
    parser.add_argument("--output", default="book.safetensors", help="the memory file (%(default)s)")
    options = parser.parse_args(arguments)

    pipeline = R3MemPipeline(options.model)
    memory = pipeline.compress(options.book)
    memory.save(options.output)
    print(memory)
    memory = Memory.load(options.output, model=pipeline.model)
    print("with the memory:   ", pipeline.generate(options.prompt, memory=memory, max_new_tokens=30))
    print("without the memory:", pipeline.generate(options.prompt, max_new_tokens=30))


if __name__ == "__main__":
    main()
