"""Options that several commands have, and what R3MemConfig calls them."""

import argparse

OF_MEMORIES = ("segment_length", "segment_overlap", "memory_segments", "memory_placement", "adapter_rows")


# Options of a new adapter, and what R3MemConfig calls them.
OF_NEW_ADAPTERS = {
    "core": "core",
    "backward": "backward",
    "lora_r": "lora_r",
    "first_adapted_layer": "first_adapted_layer",
    "memory_tokens": "num_memory_tokens",
    "segment_length": "segment_length",
    "segment_overlap": "segment_overlap",
    "memory_segments": "max_memory_segments",
    "memory_placement": "memory_placement",
    "adapter_rows": "adapter_rows",
}


# How an adapter that is made by `train` is trained.
OF_TRAINING = {
    "distillation": "distillation_weight",
    "memory_dropout": "memory_dropout",
    "bptt_segments": "bptt_segments",
    "kept_segments": "kept_segments",
}


def add_new_adapter_options(parser, memory_tokens):
    parser.add_argument("--lora-r", type=positive, help="rank of a new adapter (16)")
    first = "layers from this one on are adapted (all if there are memory tokens, else from the core on)"
    parser.add_argument("--first-adapted-layer", type=int, metavar="LAYER", help=first)
    parser.add_argument("--memory-tokens", type=int, help=f"of a new adapter; 0: none ({memory_tokens})")
    parser.add_argument("--segment-length", type=positive, help="of its segments, in tokens (256)")
    parser.add_argument("--segment-overlap", type=int, help="tokens before a segment that are read with it (0)")
    parser.add_argument("--memory-segments", type=positive, help="of which the memory is kept (1)")
    parser.add_argument("--memory-placement", choices=["every_layer", "input"], help="of its memories (every_layer)")
    parser.add_argument("--adapter-rows", choices=["all", "memory"], help="that it changes, reading forward (all)")


def add_adapter(parser, folder):
    parser.add_argument("folder", metavar="FOLDER", help=f"{folder}; or its hub id")
    parser.add_argument("--model", help="its base model: a folder or hub id (where it was when the adapter was made)")


def add_row_options(parser):
    parser.add_argument("--level", choices=["document", "paragraph", "entity"], help="only rows of this level")
    parser.add_argument("--name", help="only the row of this name, see `r3mem inspect`")


def add_run_options(parser):
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of the weights (the adapter's; the fastest that fits)",
    )
    add_machine_options(parser)


def add_machine_options(parser):
    parser.add_argument("--device", help="cpu, cuda, ... (a GPU if there is one)")
    parser.add_argument("--threads", type=positive, help="of torch on the CPU; 1 on a busy machine (one a core)")


def add_model_options(parser, dtype):
    parser.add_argument(
        "--dtype", default=dtype, choices=["bfloat16", "float16", "float32"], help="of the weights (%(default)s)"
    )
    parser.add_argument("--bits", type=int, default=4, choices=[1, 2, 4, 8], help="side bits (%(default)s)")
    parser.add_argument(
        "--fraction-bits", type=fraction_bits, default=14, help="of the streams, a number or auto (%(default)s)"
    )
    add_machine_options(parser)


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def core(text):
    if text == "all":
        return text
    try:
        first, end = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be FIRST,END or all, got {text!r}") from None
    return first, end


def fraction_bits(text):
    return text if text == "auto" else int(text)
