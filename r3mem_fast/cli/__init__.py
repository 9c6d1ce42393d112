"""The `r3mem` command. Its modules import torch and transformers only when a command needs them."""

from .main import main, parser

__all__ = ["main", "parser"]
