import os

# Set before transformers is imported: a test that would reach for a model hub fails at once, here and in CI.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import settings

# The first example of a property pays for imports and compilation, so a deadline per example says nothing.
settings.register_profile("r3mem", deadline=None)
settings.load_profile("r3mem")
