"""Names that settings, files and the code below them choose between. Needs no torch."""

# How a core is read backward: by the momentum update in reversed order, or by the coupling's own inverse.
FORMS = ("reversed", "inverse")
# What a memory is: keys and values in every layer, or embeddings before the first.
PLACEMENTS = ("every_layer", "input")
# What training keeps of a segment until the backward pass.
KEPT_SEGMENTS = ("none", "device", "host")
# What the adapters act on, forward.
ADAPTER_ROWS = ("all", "memory")
# Parts of a document.
LEVELS = ("document", "paragraph", "entity")
