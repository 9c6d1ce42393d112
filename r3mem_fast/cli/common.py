"""What several commands do."""

import sys


def say(options, text):
    """A line for the person at the terminal, beside what the command prints."""
    print(f"r3mem {options.command}: {text}", file=sys.stderr, flush=True)


def begin(options, what):
    """The first line, before torch and transformers are imported, which takes some seconds; then their settings."""
    print(f"{what} ...", file=sys.stderr, flush=True)
    from ..integrations.quiet import quiet

    quiet()
    if getattr(options, "threads", None) is not None:
        import torch

        torch.set_num_threads(options.threads)


def pipeline_of(options, model, **settings):
    """The pipeline of a model or an adapter, on the device and in the dtype that are asked for."""
    from .. import R3MemPipeline

    return R3MemPipeline(model, device=device_of(options), dtype=options.dtype, **settings)


def adapter_of(options):
    """`r3mem.json` of the adapter that is asked for, before anything that takes long is loaded."""
    from ..data.hub import is_path
    from ..manifest import folder_of_adapter, read_manifest

    folder = folder_of_adapter(options.folder)
    if not folder.exists() and not is_path(options.folder) and "/" in options.folder:
        print(f"Looking for {options.folder} on the hub ...", file=sys.stderr, flush=True)
        from .. import adapter_folder

        folder = adapter_folder.find(options.folder)
    return read_manifest(folder)


def texts_of(options):
    """The texts that are named, by their paths."""
    from pathlib import Path

    from ..data.text import read_text

    if len({Path(path).resolve() for path in options.texts}) < len(options.texts):
        raise ValueError("a text is named twice")
    return {path: read_text(path) for path in options.texts}


def device_of(options):
    """The device that is asked for, known to be there; else a GPU if there is one, else the CPU."""
    import torch

    if options.device is not None:
        from ..devices import as_device

        return as_device(options.device)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
