"""Writes windows of texts and of questions about them, which a model asks itself, for `r3mem train`.

    python -m bench.self_study novels wikipedia help --data FOLDER --passages 240 -o asked.jsonl

A line is a window of two segments: a passage, and then what asks for it: questions that the model wrote while it read
the passage, with its answers, and sentences of the passage to go on with. Where the tokenizer has a chat template,
every second window is a conversation in it. Passages come from the first part of each text (`--hold-out`), evenly from
each kind. Whether the answers are right does not matter: trained on is how a model that has read the passage goes on
(compare self-study in Cartridges, arXiv 2506.06266).
"""

import argparse
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache

from r3mem_fast import load_model
from r3mem_fast.codec import around_words
from r3mem_fast.files import replacing

from .texts import KINDS, first_part, texts_of

EXAMPLES = (
    "Text: The bridge over the Lune was opened in 1849 by Joseph Locke. It cost 12,000 pounds and carried two tracks "
    "until a storm destroyed it.\n\nQuestion: Who opened the bridge?\nAnswer: Joseph Locke\nQuestion: How much did "
    "the bridge cost?\nAnswer: 12,000 pounds\nQuestion: What did the storm do?\nAnswer: It destroyed the bridge.\n\n"
    "Text: "
)
OPENERS = ("What", "Who", "When", "Where", "How")
_NEW_TOKENS = 32
_ANSWER_WORDS = 20
Asked = tuple[str, str]  # a question and its answer


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the windows that the command line asks for, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.self_study", description=__doc__.split("\n")[0])
    parser.add_argument("kinds", nargs="+", choices=KINDS, help="see bench/texts.py")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--model", default="smollm2-135m", help="(%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="(%(default)s)")
    parser.add_argument("--passages", type=int, default=240, help="(%(default)s)")
    parser.add_argument("--segment", type=int, default=256, help="tokens of a passage (%(default)s)")
    parser.add_argument("--hold-out", type=float, default=0.5, help="share of each text, at its end (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="passages read at one time (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a .jsonl file")
    options = parser.parse_args(arguments)
    with replacing(options.output) as path:
        path.write_text("".join(f"{json.dumps(line)}\n" for line in _windows(options)), encoding="utf-8")
    return 0


def _windows(options: argparse.Namespace) -> Iterator[dict[str, str]]:
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    draw = random.Random(options.seed)
    torch.manual_seed(options.seed)
    talks = getattr(tokenizer, "chat_template", None) is not None
    opening = _ids(tokenizer, around_words(tokenizer)[0]) if talks else []
    passages = _passages(options, tokenizer, draw)
    for start in tqdm(range(0, len(passages), options.batch), desc="Asking"):
        some = passages[start : start + options.batch]
        talk = talks and start // options.batch % 2 == 1
        length = options.segment - len(opening) * talk
        some = [(kind, ids[:length]) for kind, ids in some]
        found = _questions(model, tokenizer, [ids for _, ids in some])
        for (kind, ids), asked in zip(some, found, strict=True):
            passage = tokenizer.decode(ids)
            asked = asked + _sentences(passage, draw)
            draw.shuffle(asked)
            text = _conversation(passage, asked, tokenizer) if talk else _exercise(passage, asked)
            yield {"kind": kind, "text": tokenizer.decode(_ids(tokenizer, text)[: 2 * options.segment])}


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _passages(options: argparse.Namespace, tokenizer: Any, draw: random.Random) -> list[tuple[str, list[int]]]:
    """Draw passages, as many of each kind: the kind, and token ids, as many in each."""
    drawn: list[tuple[str, list[int]]] = []
    for kind in options.kinds:
        rows = [_ids(tokenizer, text) for text in texts_of(kind, options.data)]
        rows = [first_part(row, options.hold_out) for row in rows]
        places = [(row, start) for row in rows for start in range(0, len(row) - options.segment + 1, options.segment)]
        count = min(len(places), options.passages // len(options.kinds))
        drawn += [(kind, row[start : start + options.segment]) for row, start in draw.sample(places, count)]
    draw.shuffle(drawn)
    return drawn


@torch.no_grad()
def _questions(model: Any, tokenizer: Any, passages: list[list[int]]) -> list[list[Asked]]:
    """Let the model ask about each passage, and answer.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        passages: Token ids, as many in each.
    """
    before, after = _ids(tokenizer, EXAMPLES), _ids(tokenizer, "\n\nQuestion:")
    openers = [_ids(tokenizer, f" {opener}")[0] for opener in OPENERS]
    read = torch.tensor([before + passage + after for passage in passages])
    cache = model(read, use_cache=True, logits_to_keep=1).past_key_values
    assert isinstance(cache, DynamicCache)
    cache.batch_repeat_interleave(len(openers))
    read = read.repeat_interleave(len(openers), 0)
    ids = torch.cat([read, torch.tensor(openers * len(passages))[:, None]], 1)
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=_NEW_TOKENS, do_sample=True,
        temperature=0.7, top_p=0.95, top_k=0, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    texts = tokenizer.batch_decode(written[:, read.shape[1] :], skip_special_tokens=True)
    found: list[list[Asked]] = [[] for _ in passages]
    for index, text in enumerate(texts):
        known = found[index // len(openers)]
        asked = asked_in(text)
        if asked is not None and asked[0] not in dict(known):
            known.append(asked)
    return found


def asked_in(text: str) -> Asked | None:
    """Read a question and its answer from what a model wrote; None if that is not of the examples' form."""
    match = re.match(r"\s*([^\n]+\?)\s*\nAnswer: *([^\n]+)\n", text)
    if match is None or len(match[2].split()) > _ANSWER_WORDS:
        return None
    return match[1], match[2].strip()


def _sentences(passage: str, draw: random.Random) -> list[Asked]:
    """Choose sentences of a passage, to go on with."""
    sentences = [sentence.split() for sentence in re.split(r"(?<=[.!?])\s+", passage)[1:-1]]
    sentences = [words for words in sentences if 6 <= len(words) <= 30]
    chosen = draw.sample(sentences, min(4, len(sentences)))
    return [
        (f'How does the sentence go on that begins with "{" ".join(words[:4])}"?', " ".join(words[4:]))
        for words in chosen
    ]


def _exercise(passage: str, asked: list[Asked]) -> str:
    return passage + "\n" + "".join(f"\nQuestion: {question}\nAnswer: {answer}" for question, answer in asked)


def _conversation(passage: str, asked: list[Asked], tokenizer: Any) -> str:
    """Let a user put the questions in turns, the first below the passage."""
    said = [f"Answer with a short phrase from the text.\nQuestion: {question}" for question, _ in asked]
    said[:1] = [f"{passage}\n\n{question}" for question in said[:1]]
    turns = [(words, f'The answer is "{answer}"') for words, (_, answer) in zip(said, asked, strict=True)]
    return around_words(tokenizer, turns)[0]


if __name__ == "__main__":
    raise SystemExit(main())
