"""Attention Matching for GPUs: what `../reference.py` specifies, in Triton."""

from .scores import attention_scores, plan_attention_scores
from .system import plan_value_system, value_system

__all__ = ["attention_scores", "plan_attention_scores", "plan_value_system", "value_system"]
