"""Other libraries' own bars and log lines, which would break into the CLI's."""

from __future__ import annotations

import logging
import os


def quiet_libraries() -> None:
    """Keep transformers, the hub's client, datasets and Optuna from writing to the terminal. Warnings stay,
    but for those of the hub's client about each new attempt.

    Loads transformers, so only commands that need it anyway call this. A library whose switch is an environment
    variable is not loaded for it.
    """
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars that no library's switch reaches, such as that of GGUF files
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    disable_progress_bars()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if "HF_HUB_VERBOSITY" not in os.environ:
        # Twelve lines about one hub that does not answer; the error that ends them says so too. How often and how long
        # it is tried is fixed in the library.
        logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    # Optuna sets its level back to INFO when it is loaded, so a filter on its messages it is.
    logging.getLogger("optuna").addFilter(_at_least_warning)


def _at_least_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING
