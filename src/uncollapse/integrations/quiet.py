"""Keep the libraries below from writing to the terminal or waiting for the network."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from uncollapse.errors import MissingExtra

LIBRARIES = ("transformers", "trl", "datasets", "accelerate", "huggingface_hub", "torch", "httpx", "filelock")


def quiet_libraries() -> None:
    """Silence progress bars and messages below errors. Raises `MissingExtra` if the training libraries are absent."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        import datasets
        import transformers
        import trl  # noqa: F401  (its absence has to be found here)
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "trl", "rl") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)


def stay_offline(model: str, dataset: str | None, *, packaged: tuple[str, ...]) -> None:
    """Forbid the Hub where model and data are on this machine: otherwise a missing network costs minutes.

    Has to be called before any Hugging Face library is imported, since they read the setting once.
    """
    local = model in packaged or Path(model).is_dir()
    if local and (dataset is None or Path(dataset).exists()):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
