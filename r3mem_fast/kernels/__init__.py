"""The operations, one sub-package each: ``r3mem_fast.kernels.coupling`` and its siblings.

Their sources lie in the checkout's top-level folder ``kernels``, which setup.py installs under this package.
"""

from pathlib import Path

# From a checkout the operations are found in place, with no install and as soon as a new one is added. The
# folder must be known for ours: in site-packages a neighbour called `kernels` is Hugging Face's.
_operations = Path(__file__).resolve().parents[2] / "kernels"
if (_operations / "coupling" / "__init__.py").is_file():
    __path__.append(str(_operations))
