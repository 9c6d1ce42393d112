"""Names of choices that settings and files offer. Needs no torch."""

# How a core is read backward: by the momentum update in reversed order, or by the coupling's own inverse.
FORMS = ("reversed", "inverse")
# What a memory consists of: keys and values in every layer, or embeddings before the first layer.
PLACEMENTS = ("every_layer", "input")
# How a memory is written: by learned memory tokens, by kept keys with values that match the attention to all keys, or
# by the latter with a learned change.
WRITERS = ("tokens", "matched", "anchored")
# What a memory is: what memory tokens have become, or slots of keys and values with an age each.
MEMORY_KINDS = WRITERS[:2]
# What happens to a matched memory beyond its budget: it is matched again, with each segment or once, when its text has
# ended; its oldest slots go; or it is an error.
BEYOND_BUDGET = ("rematch", "rematch_once", "forget", "error")
# How the slots of a matched memory are shared: as many for each head of each layer, or by what is asked of them.
ALLOCATIONS = ("uniform", "adaptive")
# Whose queries a matched memory is matched to: those of the pass that read the text, of another pass behind the first,
# and of the questions that its hierarchy asks; or of several.
QUERIES = ("own", "reread", "pairs", "own+reread", "own+pairs", "reread+pairs", "own+reread+pairs")
# Where training keeps what a segment computed until the backward pass; "none": it runs the segment again.
KEPT_SEGMENTS = ("none", "device", "host")
# Tokens that the adapters act on in the forward direction: all, or memory tokens alone.
ADAPTER_ROWS = ("all", "memory")
# Levels of a document's hierarchy.
LEVELS = ("document", "paragraph", "entity")
