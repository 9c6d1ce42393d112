"""What a memory will be asked of a piece of its text, by the hierarchy of that."""

import torch

from .codec import TextCodec
from .hierarchy import queries_of


class SegmentQuestions:
    """Writes the queries of the context–query pairs of a segment (R3Mem, section 3), to match its memory to them.

    Args:
        codec: Codec of the model's tokenizer.
    """

    def __init__(self, codec: TextCodec):
        self._codec = codec

    def __call__(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Token ids of the queries, int64 `[n]` each.

        Args:
            ids: Token ids of a segment, int64 `[T]`.
        """
        queries = queries_of(self._codec.text(ids), self._codec.tokenizer)
        return [torch.tensor(self._codec.ids(query)) for query in queries]


class AskingTexts:
    """Writes texts that ask for a piece of a text, to refine its memory by: the piece itself, and its queries.

    Args:
        codec: Codec of the model's tokenizer.
    """

    def __init__(self, codec: TextCodec):
        self._codec = codec
        self._known: dict[tuple[int, ...], list[torch.Tensor]] = {}

    def __call__(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Token ids of the texts, int64 `[n]` each.

        Args:
            ids: Token ids of the piece, int64 `[T]`.
        """
        piece = tuple(ids.tolist())
        if piece not in self._known:  # the queries take longer to find than a step takes
            text = self._codec.text(ids)
            asked = [text, "\n".join(queries_of(text, self._codec.tokenizer))]
            found = [torch.tensor(self._codec.ids(f"\n\n{text}")) for text in asked if text]
            self._known[piece] = found or [ids]  # a piece of special tokens alone is no text
        return self._known[piece]
