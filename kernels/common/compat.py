"""Answers to all questions about versions and about what this machine can run; they are asked nowhere else."""

import functools
import importlib.util

import torch

TRITON_RANGE = ((3, 6), (3, 10))  # from, up to but not including
MIN_CUDA_CAPABILITY = (8, 0)
MAX_HEAD_DIM = 256  # of kernels that have heads
# AMD's architectures with as much shared memory, and as wide warps, as that which the kernels are compiled for.
_HIP_ARCHITECTURES = ("gfx90a", "gfx940", "gfx941", "gfx942", "gfx950")


@functools.cache
def why_no_triton() -> str | None:
    """Say why Triton kernels cannot be compiled here, whatever the device.

    Returns:
        The reason in a few words, or None if they can.
    """
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    import triton

    version = triton.__version__  # not the distribution's, which has other names on other platforms
    low, high = (".".join(map(str, bound)) for bound in TRITON_RANGE)
    if not TRITON_RANGE[0] <= _release(version) < TRITON_RANGE[1]:
        return f"triton {version} is installed; these kernels are tested with {low} up to, not including, {high}"
    return None


def why_no_triton_on(device: torch.device, dtypes: tuple[torch.dtype, ...] = (), head_dim: int = 1) -> str | None:
    """Say why Triton kernels cannot run on tensors of this device and these dtypes.

    On a CPU they run in Triton's interpreter only.

    Args:
        device: Device of the tensors.
        dtypes: Dtypes of the tensors.
        head_dim: Size of a head, where there are any.

    Returns:
        The reason in a few words, or None if they can.
    """
    if reason := why_no_triton():
        return reason
    if torch.float64 in dtypes:
        return "the kernels compute in float32"
    if head_dim > MAX_HEAD_DIM:
        return f"heads of {head_dim} elements are larger than the kernels' {MAX_HEAD_DIM}"
    if interpreting() and torch.bfloat16 in dtypes:
        return "Triton's interpreter computes bfloat16 wrongly (use float16 or float32 there)"
    if device.type == "cpu":
        return None if interpreting() else "Triton has no CPU backend, and TRITON_INTERPRET=1 is not set"
    if device.type != "cuda":
        return f"there are no Triton kernels for the device type {device.type!r}"
    if not _sees_gpu():
        return "PyTorch sees no GPU here"
    if interpreting():
        return None
    return _why_not_capable(device.index if device.index is not None else torch.cuda.current_device())


def interpreting() -> bool:
    """Return whether Triton's interpreter, which runs kernels on the CPU in NumPy, stands in for its compiler."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def threads_per_warp() -> int:
    """Return the number of threads of a warp: 32 on NVIDIA's GPUs, 64 on AMD's that these kernels support."""
    return 32 if torch.version.hip is None else 64


@functools.cache
def target_of(device: torch.device) -> str:
    """Name a GPU as the compiler's targets are named: cuda:90, hip:gfx942.

    cuda:89 stands for all GPUs with 99 KiB of shared memory a program (compute capability 8.6, 8.9, 12.x).

    Args:
        device: The GPU; without an index, the current one.

    Returns:
        The target's name.
    """
    index = device.index if device.index is not None else torch.cuda.current_device()
    if torch.version.hip is not None:
        return f"hip:{torch.cuda.get_device_properties(index).gcnArchName.split(':')[0]}"
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) in ((8, 6), (8, 9)) or major == 12:
        return "cuda:89"
    return f"cuda:{major}0"


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of an NVIDIA GPU; (0, 0) for any other device.

    Args:
        device: The device; a GPU without an index is the current one.

    Returns:
        Major and minor version.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


@functools.cache
def _sees_gpu() -> bool:
    return torch.cuda.is_available()


@functools.cache
def _why_not_capable(index: int) -> str | None:
    """Say why a GPU's architecture, or compute capability, does not suffice; None if it does."""
    if torch.version.hip is not None:
        architecture = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
        known = ", ".join(_HIP_ARCHITECTURES)
        return None if architecture in _HIP_ARCHITECTURES else f"{architecture} is none of {known}"
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CUDA_CAPABILITY:
        have, need = (".".join(map(str, c)) for c in (capability, MIN_CUDA_CAPABILITY))
        return f"{torch.cuda.get_device_name(index)} has compute capability {have}; the kernels need {need}"
    return None


def _release(version: str) -> tuple[int, ...]:
    """Return major and minor version, without a local part."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])
