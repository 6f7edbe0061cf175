"""The model zoo: `tiny`, `smollm2-135m`, any Hub id or local path.

from uncollapse import models

model, tokenizer = models.load("tiny")
"""

from uncollapse.models.cache import cache_directory
from uncollapse.models.smollm2 import MissingWeights
from uncollapse.models.zoo import load, load_as_saved, model_names, models

__all__ = [
    "MissingWeights",
    "cache_directory",
    "load",
    "load_as_saved",
    "model_names",
    "models",
]
