"""Memory-token attention for GPUs: what `../reference.py` specifies, in Triton."""

from . import forward_specialised
from .backward import memory_attention_backward, plan_memory_attention_backward
from .decode import memory_decode, plan_memory_decode
from .forward import memory_attention, plan_memory_attention

__all__ = [
    "forward_specialised",
    "memory_attention",
    "memory_attention_backward",
    "memory_decode",
    "plan_memory_attention",
    "plan_memory_attention_backward",
    "plan_memory_decode",
]
