"""Loads what comes from outside: models and tokenizers, adapters on the hub, texts."""
