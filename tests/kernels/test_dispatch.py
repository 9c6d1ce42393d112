"""Which implementation runs, and what happens when the one that was asked for cannot."""

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from r3mem_fast.kernels import coupling
from r3mem_fast.kernels.common import compat, dispatch
from r3mem_fast.kernels.common.dispatch import VARIABLE, choose

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def test_the_reference_runs_on_a_cpu():
    assert choose(CPU) == ("reference", "device type cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_triton_runs_on_a_gpu():
    assert choose(torch.device("cuda")).implementation == "triton"


def test_the_reference_can_be_forced(monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    assert choose(torch.device("cuda")) == ("reference", "R3MEM_KERNELS=reference")


def test_an_unknown_name_raises(monkeypatch):
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(ValueError, match="R3MEM_KERNELS must be reference or triton, or unset; it is 'cuda'"):
        choose(CPU)


def test_forced_triton_without_an_interpreter_raises_on_a_cpu():
    """In a process of its own: the variable is read where kernels are defined. The operation raises too."""
    code = (
        "import torch\n"
        "from r3mem_fast.kernels import coupling\n"
        "flags = coupling.new_flags('cpu')\n"
        "coupling.momentum_enter(torch.ones(4), fraction_bits=14, flags=flags)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {VARIABLE: "triton"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "R3MEM_KERNELS=triton cannot run on cpu: Triton has no CPU backend" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here")
def test_forced_triton_in_the_interpreter(monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")
    assert choose(CPU, (torch.float32,)) == ("triton", "R3MEM_KERNELS=triton, interpreted")
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16 wrongly"):
        choose(CPU, (torch.int32, torch.bfloat16))
    flags = coupling.new_flags("cpu")
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16 wrongly"):
        coupling.momentum_enter(torch.ones(4, dtype=torch.bfloat16), fraction_bits=14, flags=flags)
    stream = torch.ones(4, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16 wrongly"):  # the output alone
        coupling.momentum_rewind(stream, stream.clone(), fraction_bits=14, dtype=torch.bfloat16)


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0.0"])
def test_versions_of_triton_that_were_not_tested(monkeypatch, version):
    monkeypatch.setattr("triton.__version__", version)
    assert compat.why_no_triton.__wrapped__() == (
        f"triton {version} is installed; these kernels are tested with 3.6 up to, not including, 3.10"
    )


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1+git8a9c5ba1", "3.9.9"])
def test_versions_of_triton_that_were(monkeypatch, version):
    monkeypatch.setattr("triton.__version__", version)
    assert compat.why_no_triton.__wrapped__() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_pytorch_does_not_see():
    dispatch._say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="PyTorch sees no GPU here"):
        assert choose(torch.device("cuda")) == ("reference", "PyTorch sees no GPU here")


def test_without_triton(monkeypatch):
    """Forced, it raises; on a GPU the reference runs, and one warning says why."""
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: None)
    reason = compat.why_no_triton.__wrapped__()
    assert reason == "the package triton is not installed"
    monkeypatch.setattr(compat, "why_no_triton", lambda: reason)
    dispatch._say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="the reference implementation runs on cuda, slowly: the package triton"):
        assert choose(torch.device("cuda")) == ("reference", reason)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said once
        assert choose(torch.device("cuda")) == ("reference", reason)
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="R3MEM_KERNELS=triton cannot run on cpu: the package triton"):
        choose(CPU)


def test_the_reference_needs_no_triton():
    """A machine without Triton imports and runs everything but the kernels."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from r3mem_fast.kernels import coupling\n"
        "flags = coupling.new_flags('cpu')\n"
        "print(coupling.momentum_enter(torch.ones(4), fraction_bits=3, flags=flags)[0].tolist())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[8, 8, 8, 8]\n"


def test_heads_that_are_too_large_for_the_kernels(monkeypatch):
    monkeypatch.setattr(compat, "why_no_triton", lambda: None)
    assert "heads of 512 elements are larger" in compat.why_no_triton_on(torch.device("cuda"), head_dim=512)
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="heads of 512 elements are larger than the kernels' 256"):
        choose(CPU, head_dim=512)


@pytest.mark.parametrize(("architecture", "known"), [("gfx90a:sramecc+", True), ("gfx942", True), ("gfx1100", False)])
def test_amds_architectures(monkeypatch, architecture, known):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties = SimpleNamespace(gcnArchName=architecture)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    reason = compat._why_not_capable.__wrapped__(0)
    assert reason is None if known else "gfx1100 is none of gfx90a" in reason
