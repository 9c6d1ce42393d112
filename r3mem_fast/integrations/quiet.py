"""Quiets other libraries on a terminal, for the command `r3mem`, which says itself what matters."""

import logging
import warnings

import huggingface_hub.utils
import transformers


def quiet() -> None:
    """Hide what a user can do nothing about: progress bars while weights load, and notices to developers.

    Downloads keep their progress bars. Errors and warnings are shown, as that of weights that a file lacks.
    """
    transformers.utils.logging.disable_progress_bar()  # turns the bars of downloads off as well
    huggingface_hub.utils.enable_progress_bars()
    # bitsandbytes complains if the package `kernels` is missing, or another package of that name is installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
