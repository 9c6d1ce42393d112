"""The package imports from a wheel, an editable install and a bare checkout, and minds its neighbours."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = [
    "r3mem_fast",
    "r3mem_fast.kernels",
    "r3mem_fast.kernels.attention",
    "r3mem_fast.kernels.coupling",
    "r3mem_fast.reversible",
]

# An editable install answers for r3mem_fast from any folder and so hides what a wheel or a checkout lacks.
WITHOUT_EDITABLE_INSTALL = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
"""
PRINT_ORIGINS = f"""
import importlib
for name in {MODULES}:
    print(importlib.import_module(name).__file__)
"""

# Every name that the supported versions of transformers import from a `kernels` whose version they accept.
KERNELS_STUB = """
import enum


class Mode(enum.Flag):
    INFERENCE = enum.auto()
    TRAINING = enum.auto()
    TORCH_COMPILE = enum.auto()


class KernelizeFallback(enum.Flag):
    NONE = 0
    ALL = enum.auto()


class _Record:
    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


class CUDAProperties(_Record): ...
class Device(_Record): ...
class LayerRepository(_Record): ...
class LocalLayerRepository(_Record): ...
class ROCMProperties(_Record): ...


decorated = []


def use_kernel_forward_from_hub(layer_name):
    decorated.append(layer_name)
    return lambda layer: layer


def use_kernelized_func(*functions):
    return lambda layer: layer


def _unexpected(*args, **kwargs):
    raise AssertionError("loading and running a model must not reach for a hub kernel")


get_kernel = kernelize = register_kernel_mapping = _unexpected
replace_kernel_forward_from_hub = use_kernel_mapping = _unexpected
"""

RUN_TINY_LLAMA = """
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
)
model = LlamaForCausalLM(config).eval()
model.save_pretrained(sys.argv[1])
loaded = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.arange(8)[None]
with torch.no_grad():
    assert torch.equal(loaded(ids).logits, model(ids).logits)
"""


def run_python(code: str, *arguments: str, cwd: Path, pythonpath: Path | None = None) -> list[str]:
    """The lines that `code` prints in a new interpreter whose imports look in `cwd`, then in `pythonpath`."""
    environment = os.environ.copy()
    for name in ("PYTHONPATH", "PYTHONSAFEPATH"):
        environment.pop(name, None)
    if pythonpath is not None:
        environment["PYTHONPATH"] = str(pythonpath)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def write_kernels_stub(folder: Path) -> None:
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text(KERNELS_STUB)
    metadata = folder / f"kernels-{KERNELS_MIN_VERSION}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the working tree with a nested operation added; building leaves no files in the original."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    skipped = [".*", "__pycache__", "*.egg-info", "build", "dist"]
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*skipped))
    nested = copy / "kernels" / "added" / "nested"
    nested.mkdir(parents=True)
    for package in (nested.parent, nested):
        (package / "__init__.py").touch()
    return copy


@pytest.fixture(scope="module")
def wheel(source) -> Path:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(source / "dist")]
    subprocess.run([*pip, *options, str(source)], check=True)
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_wheel_holds_every_module_and_nothing_else(source, wheel):
    """The wheel has every module, operations under r3mem_fast/kernels, also one that was added just before;
    it has no top-level `kernels`, no tests and no benchmarks. The adapters that come with it are in it."""
    expected = {path.relative_to(source) for path in (source / "r3mem_fast").rglob("*.py")}
    expected |= {"r3mem_fast" / path.relative_to(source) for path in (source / "kernels").rglob("*.py")}
    adapters = [path for path in (source / "r3mem_fast" / "adapters").rglob("*") if path.is_file()]
    assert any(path.name == "adapter_model.safetensors" for path in adapters)
    expected |= {path.relative_to(source) for path in [*adapters, source / "r3mem_fast" / "py.typed"]}
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    metadata = {name for name in names if name.parts[0].endswith(".dist-info")}
    assert names - metadata == expected
    assert Path("r3mem_fast/kernels/added/nested/__init__.py") in names
    assert any(name.name == "LICENSE" for name in metadata)


def test_wheel_imports_away_from_the_checkout(wheel, tmp_path):
    """Installed elsewhere beside Hugging Face's `kernels`, the wheel's own files are imported, and the
    neighbour is not searched for operations."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-index", "--no-deps", "--target", str(site), str(wheel)], check=True)
    write_kernels_stub(site)
    print_path = "print(importlib.import_module('r3mem_fast.kernels').__path__)"
    *origins, search_path = run_python(
        WITHOUT_EDITABLE_INSTALL + PRINT_ORIGINS + print_path, cwd=tmp_path, pythonpath=site
    )
    for origin in origins:
        assert Path(origin).is_relative_to(site)
    assert search_path == str([str(site / "r3mem_fast" / "kernels")])


def test_checkout_imports_without_an_install():
    """From the repository root, with no install to help, the imports work and find this checkout's files."""
    origins = run_python(WITHOUT_EDITABLE_INSTALL + PRINT_ORIGINS, cwd=ROOT)
    for origin in origins:
        assert Path(origin).is_relative_to(ROOT)
    assert ROOT / "kernels" / "coupling" / "__init__.py" in map(Path, origins)


def test_editable_install_imports_from_elsewhere(tmp_path):
    """After `make setup` the imports work in any folder and find this checkout's files."""
    try:
        installed = importlib.metadata.distribution("r3mem_fast").read_text("direct_url.json") or ""
    except importlib.metadata.PackageNotFoundError:
        installed = ""
    if ROOT.as_uri() not in installed:
        pytest.skip("this checkout is not installed")
    for origin in run_python(PRINT_ORIGINS, cwd=tmp_path):
        assert Path(origin).is_relative_to(ROOT)


def test_top_level_kernels_is_no_package():
    """With an `__init__.py` the folder would win over Hugging Face's package from the repository root."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_runs_beside_a_kernels_distribution(tmp_path):
    """From the repository root, `import kernels` gives the installed `kernels` of an accepted version,
    transformers decorates its layers with it, and a model saves, loads and runs."""
    write_kernels_stub(tmp_path / "site")
    check_kernels = """
import kernels
from transformers.utils.import_utils import is_kernels_available

import r3mem_fast.kernels.coupling

assert is_kernels_available()
assert "RMSNorm" in kernels.decorated
print(kernels.__file__)
"""
    code = "import sys" + RUN_TINY_LLAMA + check_kernels
    origin = run_python(code, str(tmp_path / "model"), cwd=ROOT, pythonpath=tmp_path / "site")[-1]
    assert Path(origin) == tmp_path / "site" / "kernels" / "__init__.py"


def test_transformers_runs_without_a_kernels_distribution(tmp_path):
    """From the repository root, where the folder `kernels` can be seen, a model saves, loads and runs."""
    run_python("import sys" + RUN_TINY_LLAMA, str(tmp_path / "model"), cwd=ROOT)


@pytest.mark.parametrize("module", ["r3mem_fast", *MODULES[1:4]])
def test_kernel_users_do_not_import_transformers(module):
    """Importing the operations leaves transformers and peft out, so that kernel users do not pay for them."""
    code = f"import sys, {module}; print(sorted({{'transformers', 'peft'}} & set(sys.modules)))"
    assert run_python(code, cwd=ROOT) == ["[]"]


def test_the_readme_claims_what_setup_allows():
    """The README's versions are those of setup.py, and the oldest are those that .ci/versions installs."""
    setup, readme = ((ROOT / name).read_text() for name in ("setup.py", "README.md"))
    oldest = (ROOT / ".ci" / "oldest.txt").read_text()
    readme = " ".join(readme.split())
    for name in ("torch", "triton", "transformers", "peft"):
        low, major, minor = re.search(rf"{name}>=([\d.]+),<(\d+)\.(\d+)", setup).groups()
        assert f"{name} {low} to {major}.{int(minor) - 1}" in readme
    for name, low in re.findall(r"[\"']([a-z_]+)>=([\d.]+),<", setup[setup.index("install_requires") :]):
        assert re.search(rf"^{name}=={re.escape(low)}(\.0)*(;|$)", oldest, re.M), f"{name} {low} is not what is tested"


def test_names_for_editors_are_those_that_can_be_imported():
    """Lazy exports, those under TYPE_CHECKING and `__all__` are the same names, from the same modules."""
    import ast

    import r3mem_fast

    tree = ast.parse((ROOT / "r3mem_fast" / "__init__.py").read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    static = {alias.name: node.module for node in checked.body for alias in node.names}
    assert static == r3mem_fast._EXPORTS and set(r3mem_fast.__all__) == {*static, "__version__"}
    assert all(getattr(r3mem_fast, name) is not None for name in r3mem_fast.__all__)
