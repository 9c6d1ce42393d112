"""The tables of stores: questions about conversations, and about documents, behind memories and beside lookups."""

from .markdown import interval, records, table

_WAYS = {
    "nothing": "nothing",
    "last": "the last tokens",
    "bm25": "BM25, whole {}",
    "minilm": "MiniLM, whole {}",
    "bm25+": "BM25, sentences",
    "minilm+": "MiniLM, sentences",
    "attended": "most attended keys, own values",
    "memory": "**memory**",
    "memories": "two memories side by side",
    "memory+bm25": "**memory and BM25**",
    "memory+minilm": "**memory and MiniLM**",
    "found": "three {} by BM25, alone",
    "memory+found": "**all of the memory, and three {} by BM25**",
    "anchored": "**memory of the packaged adapter**",
    "anchored+bm25": "**memory of the packaged adapter and BM25**",
    "anchored+minilm": "**memory of the packaged adapter and MiniLM**",
    "snapkv": "SnapKV",
    "keydiff": "KeyDiff",
    "expected": "Expected Attention",
    "kvzip": "KVzip",
    "foreign": "memory of something else",
    "first": "the best paragraph, whole",
    "full": "all of it",
}

# Ways of `bench.recalled`, as the table calls them.
_RECALLED = {
    "nothing": "nothing",
    "full": "the paragraph that it is about",
    "another": "another paragraph",
    "bm25": "the best paragraph by BM25",
    "minilm": "the best paragraph by MiniLM",
    "bm25+": "the best sentence by BM25",
    "recalled": "**recalled for the question itself**",
    "by_query": "**recalled for the learned query that fits best by BM25**",
    "by_document": "**recalled for the query of the document that this one is of**",
}
_MEASURES = {"f1": "F1", "rouge_l": "ROUGE-L", "contains": "contains"}


def conversations() -> str:
    """Tabulate questions about conversations."""
    return _ways("agent_smollm2", "turns")


def conversations_paired() -> str:
    """Tabulate what memories of conversations are better by than their rivals at equal slots."""
    return _paired("agent_smollm2", "turns")


def documents() -> str:
    """Tabulate questions about paragraphs."""
    return _ways("rag_smollm2", "paragraphs")


def documents_paired() -> str:
    """Tabulate what memories of paragraphs are better by than their rivals at equal slots."""
    return _paired("rag_smollm2", "paragraphs")


def conversations_shared() -> str:
    """Tabulate questions about some of the conversations behind memories whose heads share their slots."""
    return _ways("agent_adaptive_smollm2", "turns")


def conversations_shared_paired() -> str:
    """Tabulate what memories of conversations are better by than their rivals, where heads share slots."""
    return _paired("agent_adaptive_smollm2", "turns")


def conversations_second_model() -> str:
    """Tabulate questions about some of the conversations, asked of a second model."""
    # Where nothing stands before a question, or all, is the same in both files.
    return _ways("agent_gemma3_270m", "turns", "agent_gemma3_270m_16")


def conversations_second_model_paired() -> str:
    """Tabulate what memories are better by there."""
    return _paired("agent_gemma3_270m", "turns", "agent_gemma3_270m_16")


def conversations_meetings() -> str:
    """Tabulate questions about meetings that were told to a store."""
    return _ways("agent_qmsum_smollm2", "pieces")


def conversations_meetings_paired() -> str:
    """Tabulate what memories of meetings are better by than their rivals at equal slots."""
    return _paired("agent_qmsum_smollm2", "pieces")


def conversations_written() -> str:
    """Tabulate what is written behind memories of some of the conversations, and beside them."""
    return _ways("agent_written_smollm2", "turns")


def documents_recalled() -> str:
    """Tabulate questions about paragraphs that adapters have learned, behind what is recalled or looked up."""
    rows = []
    for record in records("recalled_smollm2"):
        if "way" in record and "better_than" not in record:
            share = interval(record["share"]) if "share" in record else "–"
            counts = [f"{record[name]:.2f}" for name in ("found", "has_answer")]
            grades = [f"{record[name]:.3f}" for name in ("nats", *_MEASURES)]
            rows.append((_RECALLED[record["way"]], *counts, f"{record['tokens']:.0f}", grades[0], share, *grades[1:]))
    head = ("before the question", "found", "has the answer", "tokens", "nats a token", "share", *_MEASURES.values())
    return table(head, rows)


def documents_shared() -> str:
    """Tabulate shares behind memories of paragraphs of both allocations, and what sharing slots is better by."""
    rivals = ("bm25+", "minilm+", "kvzip")
    uniform, shared = (
        {record["way"]: record["share"] for record in records(f"{name}_smollm2") if "share" in record}
        for name in ("rag", "rag_adaptive")
    )
    found = records("rag_adaptive_smollm2")
    better = {(r["way"], r["better_than"]): interval(r) for r in found if r.get("of") == "nats"}
    ours = ("memory", "memory+bm25", "memory+minilm")
    rows = []
    for way in sorted(shared, key=lambda way: list(_WAYS).index(way.rpartition("_")[0] or way)):
        kind = way.rpartition("_")[0]
        # What has no slots is the same in both.
        if kind in (*ours, "attended", "memories", "foreign", "kvzip", "expected"):
            cells = [interval(uniform[way]), interval(shared[way])]
            cells += [better.get((way, rival), "–") for rival in rivals]
            rows.append((_name(way, "paragraphs"), *cells))
    names = (f"better than {_WAYS[rival]} by" for rival in rivals)
    return table(("before the question, slots", "share, uniform", "share, adaptive", *names), rows)


def store_times() -> str:
    """Tabulate what adding a turn and a first token cost."""
    return _times("store_times_smollm2")


def store_times_shared() -> str:
    """Tabulate what they cost where heads share slots."""
    return _times("store_times_adaptive_smollm2")


def _times(name: str) -> str:
    found = records(name)
    turn = next(record for record in found if record.get("turn") == "add")
    rows = [
        ("a turn is read by the model alone", f"{turn['read_milliseconds']:.0f} ms", "1"),
        ("**a turn is added to the store**", f"{turn['milliseconds']:.0f} ms", interval(turn["over_read"])),
    ]
    ways = {
        "prefill": "first token: the whole conversation is read",
        "memory": "**first token behind the memory**",
        "opened": "the same, in a store that was just opened",
        "passages": "the same, with four turns looked up",
    }
    firsts = {record["first_token"]: record for record in found if "first_token" in record}
    for way, text in ways.items():
        ratio = interval(firsts[way]["over_prefill"]) if way != "prefill" else "1"
        rows.append((text, f"{firsts[way]['milliseconds']:.0f} ms", ratio))
    return table(("", "median", "of the first row of its kind (95 %)"), rows)


def _ways(name: str, pieces: str, *more: str) -> str:
    """Tabulate the ways of a file, and of more files those that have slots."""
    found = [record for record in records(name) if "share" in record or record.get("way") in ("nothing", "full")]
    found += [record for other in more for record in records(other) if "share" in record]
    measures = {key: head for key, head in _MEASURES.items() if key in found[0]}
    rows = []
    for record in found:
        share = interval(record["share"]) if "share" in record else "–"
        others = [f"{record[key]:.3f}" for key in measures]
        rows.append((_name(record["way"], pieces), f"{record['slots']:.0f}", f"{record['nats']:.3f}", share, *others))
    return table(("before the question", "tokens and slots", "nats a token", "share", *measures.values()), rows)


def _paired(name: str, pieces: str, *more: str) -> str:
    """Tabulate how many nats a token matched memories are better by, a row for each rival and number of slots."""
    found = {
        (r["way"], r["better_than"]): interval(r)
        for file in (name, *more)
        for r in records(file)
        if r.get("of") == "nats" and r["way"].startswith("memory")
    }
    ways = list(dict.fromkeys(way.rpartition("_")[0] for way, _ in found))
    ways.sort(key=list(_WAYS).index)
    cases = dict.fromkeys((way.rpartition("_")[2], rival) for way, rival in found if not rival.startswith("memory"))
    rows = [
        (_name(f"{rival}_{slots}", pieces), *(found[f"{way}_{slots}", rival] for way in ways))
        for slots, rival in cases
    ]
    return table(("beside (nats a token, 95 %)", *(_WAYS[way].format(pieces) for way in ways)), rows)


def _name(way: str, pieces: str) -> str:
    kind, _, slots = way.rpartition("_")
    return f"{_WAYS[kind].format(pieces)}, {slots}" if kind else _WAYS[slots]


TABLES = {
    "conversations": conversations,
    "conversations_paired": conversations_paired,
    "store_times": store_times,
    "store_times_shared": store_times_shared,
    "documents": documents,
    "documents_paired": documents_paired,
    "documents_shared": documents_shared,
    "documents_recalled": documents_recalled,
    "conversations_written": conversations_written,
    "conversations_shared": conversations_shared,
    "conversations_shared_paired": conversations_shared_paired,
    "conversations_second_model": conversations_second_model,
    "conversations_second_model_paired": conversations_second_model_paired,
    "conversations_meetings": conversations_meetings,
    "conversations_meetings_paired": conversations_meetings_paired,
}
