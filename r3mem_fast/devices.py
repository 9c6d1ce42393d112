"""Turns names into devices and dtypes that are known to be there."""

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return the dtype of weights that a name stands for.

    Args:
        dtype: A name in `DTYPES`, or one of the dtypes there.

    Returns:
        The dtype.

    Raises:
        ValueError: It is none of these.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        near = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
        meant = f"; did you mean {near[dtype]!r}?" if dtype in near else ""
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)} (or torch.bfloat16, ...), got {dtype!r}{meant}")
    return found


def as_device(device: torch.device | str | int) -> torch.device:
    """Return the device that a name stands for, and make sure that it is there.

    Args:
        device: A device or its name, "cuda" or "cpu" for example.

    Returns:
        The device.

    Raises:
        ValueError: There is no device of this name, or not on this machine.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} names no device: {str(error).splitlines()[0]}") from None
    if found.type in ("cpu", "meta"):
        return found
    here = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if here is not None else 0
    if here is None or found.type != here.type or (found.index or 0) >= count:
        has = "no GPU" if here is None else f"{count} device(s) of the type {here.type!r}"
        raise ValueError(
            f"device {str(found)!r} is not here: this PyTorch ({torch.__version__}) sees {has}. Use device cpu, or "
            "install a PyTorch for your GPU"
        )
    return found


def default_dtype(device: torch.device | str) -> torch.dtype:
    """Choose the dtype for computing on a device.

    Args:
        device: A device or its name.

    Returns:
        torch.bfloat16 if the device has instructions for it, else torch.float32; on a CPU too.
    """
    device = torch.device(device)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = False
    return torch.bfloat16 if native else torch.float32
