"""The tables of inference behind memories: decoding, many requests, the time to a first token, and compressing."""

from .markdown import records, table

_DECODE = {
    "plain_dynamic": "the plain model, growing cache",
    "plain_room": "the plain model, cache that grows in place",
    "memory_dynamic": "**behind a memory**, cache that grows in place",
    "plain_static": "the plain model, static cache",
    "memory_static": "**behind a memory**, static cache",
    "adapters": "behind a memory that learned, with LoRA on all linear modules",
    "merged": "the same, **merged** into the weights",
    "hooks": "behind a memory, by the reversible layers' hooks",
}
_FROM = {
    "memory": "**its memory**, from a file",
    "cache": "all its keys and values, from a file",
    "prefill": "its text",
    "prompt": "no history: the prompt alone",
}


def decode() -> str:
    """Return the table of the time for a token behind a memory and behind as many tokens."""
    rows = []
    for record in records("decode_smollm2"):
        cells = [f"{record[key]:.2f}" for key in ("token_ms", "p95_ms")]
        over = "–"
        if "over_rival" in record:
            over = f"{record['over_rival']:.3f} ({record['lowest']:.3f} to {record['highest']:.3f})"
            over += " of the row above" if record["arm"] == "merged" else ""
        rows.append((str(record["rows"]), _DECODE[record["arm"]], *cells, over, _count(record)))
    names = ("rows", "written by", "a token, ms", "95 %, ms", "over the plain model's", "operations a token and layer")
    return table(names, rows)


def _count(record: dict) -> str:
    return "–" if record["operations"] is None else f"{record['operations']:.2f}"


_ROWS = {("generate", 32): "1, by `generate`", ("32", 1): "32, behind one memory"}


def serving() -> str:
    """Return the table of many requests at a time."""
    rows = [
        (
            _ROWS.get((r["rows"], r["memories"]), r["rows"]), f"{r['tokens_per_second']:.1f}",
            f"{r['over_generate']:.2f} × ({r['lowest']:.2f} to {r['highest']:.2f})", f"{r['first_ms'] / 1e3:.2f}",
            f"{r['first_p95_ms'] / 1e3:.2f}",
        )
        for r in records("serving_smollm2")
        if "tokens_per_second" in r
    ]  # fmt: skip
    names = ("requests at one time", "tokens/s", "over `generate`, one at a time", "first token, s", "95 %, s")
    return table(names, rows)


def first_token() -> str:
    """Return the table of the time to the first token behind a long history."""
    rows = [
        (
            _FROM[r["first_token_from"]], f"{r['ms']:.1f}", f"{r['memory_over_it']:.3f} ×",
            "–" if r["bytes"] is None else f"{r['bytes'] / 1e6:.1f} MB",
        )
        for r in records("serving_smollm2")
        if "first_token_from" in r
    ]  # fmt: skip
    return table(("from", "first token, ms", "the memory takes of it", "file"), rows)


def compress_speed() -> str:
    """Return the table of compressing against plain prefill."""
    rows = [
        (
            r["dtype"], r["attention"], str(r["budget"]), f"{r['compress_tokens_per_second']:.0f}",
            f"{r['prefill_tokens_per_second']:.0f}",
            f"{r['of_prefill']:.2f} ({r['lowest']:.2f} to {r['highest']:.2f})",
            f"{r['compress_operations']:.1f} of {r['prefill_operations']:.1f}",
        )
        for r in (*records("compress_speed_smollm2"), *records("compress_speed_r3mem_smollm2"))
    ]  # fmt: skip
    names = ("dtype", "attention", "slots in all", "compress, tokens/s", "plain prefill, tokens/s",
             "compress of prefill", "operations a segment and layer")  # fmt: skip
    return table(names, rows)


TABLES = {"decode": decode, "serving": serving, "first_token": first_token, "compress_speed": compress_speed}
