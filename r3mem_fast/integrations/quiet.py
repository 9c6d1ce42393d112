"""Less noise from other libraries on a terminal; for the command, which has a line of its own for what matters."""

import logging
import warnings

import huggingface_hub.utils
import transformers


def quiet():
    """Hide what a user can do nothing about: bars while weights load, and notices to developers.

    Downloads keep their bars; errors and warnings are shown, such as that of weights that a file lacks.
    """
    transformers.utils.logging.disable_progress_bar()  # which turns those of downloads off as well
    huggingface_hub.utils.enable_progress_bars()
    # It complains that the package `kernels` is missing, or another one of that name is in sight.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
