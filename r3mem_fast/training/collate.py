"""Context–query pairs as batches of token ids."""

import torch


class PairCollator:
    """A list of pairs as the arguments of `R3MemModel.forward`, padded on the right.

    A pair is a `hierarchy.Pair` or anything else with the strings `context` and `query`, as attribute or key. An empty
    context says that its query has none. tokenizer: of the model.
    Returns int64 `[B, T]` `input_ids`, `attention_mask`, `labels`, and `[B, Q]` `query_input_ids`,
    `query_attention_mask`. Raises ValueError for an empty list or an empty query.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, pairs) -> dict[str, torch.Tensor]:
        if not pairs:
            raise ValueError("there is no pair to make a batch of")
        rows = [(self._ids(pair, "context"), self._ids(pair, "query")) for pair in pairs]
        return collate_ids(rows)

    def _ids(self, pair, name):
        text = pair[name] if isinstance(pair, dict) else getattr(pair, name)
        ids = self._tokenizer(text, add_special_tokens=False).input_ids if text else []
        if name == "query" and not ids:
            raise ValueError("a pair has an empty query")
        return ids


def collate_ids(rows) -> dict[str, torch.Tensor]:
    """The same of `(context ids, query ids)`, lists of int."""
    input_ids, mask = padded([context for context, _ in rows])
    queries, query_mask = padded([query for _, query in rows])
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": input_ids.masked_fill(mask == 0, -100),
        "query_input_ids": queries,
        "query_attention_mask": query_mask,
    }


def padded(rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of token ids, padded on the right with 0: ids and mask, int64 `[B, longest]`, at least one column."""
    longest = max(1, *(len(row) for row in rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[index, : len(row)] = 1
    return ids, mask
