"""The tables of stores: questions about conversations, and about documents, behind memories and beside lookups."""

from .markdown import interval, records, table

_WAYS = {
    "nothing": "nothing",
    "last": "the last tokens",
    "bm25": "BM25, turns or paragraphs",
    "minilm": "MiniLM, turns or paragraphs",
    "bm25+": "BM25, sentences",
    "minilm+": "MiniLM, sentences",
    "attended": "most attended keys, own values",
    "memory": "**memory**",
    "memories": "two memories side by side",
    "memory+bm25": "**memory and BM25**",
    "memory+minilm": "**memory and MiniLM**",
    "snapkv": "SnapKV",
    "keydiff": "KeyDiff",
    "expected": "Expected Attention",
    "kvzip": "KVzip",
    "foreign": "memory of something else",
    "first": "the best paragraph, whole",
    "full": "all of it",
}


def conversations() -> str:
    """Tabulate questions about conversations."""
    return _ways("agent_smollm2")


def conversations_paired() -> str:
    """Tabulate what memories of conversations are better by than their rivals at equal slots."""
    return _paired("agent_smollm2")


def documents() -> str:
    """Tabulate questions about paragraphs."""
    return _ways("rag_smollm2")


def documents_paired() -> str:
    """Tabulate what memories of paragraphs are better by than their rivals at equal slots."""
    return _paired("rag_smollm2")


def _ways(name: str) -> str:
    head = (
        "before the question",
        "tokens and slots",
        "nats a token",
        "share of all of it",
        "F1",
        "ROUGE-L",
        "contains",
    )
    rows = []
    for record in records(name):
        if "share" in record or record.get("way") in ("nothing", "full"):
            share = interval(record["share"]) if "share" in record else "–"
            measured = [f"{record[key]:.3f}" for key in ("nats", "f1", "rouge_l", "contains")]
            rows.append((_name(record["way"]), f"{record['slots']:.0f}", measured[0], share, *measured[1:]))
    return table(head, rows)


def _paired(name: str) -> str:
    measures = {"nats": "nats a token", "f1": "F1"}
    found: dict[tuple[str, str], dict[str, str]] = {}
    for record in records(name):
        if "better_than" in record and record["of"] in measures:
            key = record["way"], record["better_than"]
            found.setdefault(key, {})[record["of"]] = interval(record)
    rows = [
        (f"{_name(way)}, beside {_WAYS[rival].replace('*', '')}", *(values[of] for of in measures))
        for (way, rival), values in found.items()
    ]
    return table(("better by (95 %)", *measures.values()), rows)


def _name(way: str) -> str:
    kind, _, slots = way.rpartition("_")
    return f"{_WAYS[kind]}, {slots}" if kind else _WAYS[slots]
