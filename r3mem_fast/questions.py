"""`SegmentQuestions`: what a memory will be asked of a segment, by the hierarchy of its text."""

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
