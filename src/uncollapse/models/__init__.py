"""The model zoo: `tiny`, `smollm2-135m`, any Hub id or local path.

from uncollapse import models

model, tokenizer = models.load("tiny")
"""

from uncollapse.models.cache import cache_directory
from uncollapse.models.smollm2 import MissingWeights
from uncollapse.models.zoo import is_classifier, load, load_classifier, model_names, models

__all__ = [
    "MissingWeights",
    "cache_directory",
    "is_classifier",
    "load",
    "load_classifier",
    "model_names",
    "models",
]
