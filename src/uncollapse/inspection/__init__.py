"""What flows through a model while it runs: hooks on attention, features and weights, for any PyTorch model.

`watch(model)` gathers everything; the modules beneath have its parts.
"""

from uncollapse.inspection.result import Inspection
from uncollapse.inspection.watcher import Watcher, watch

__all__ = ["Inspection", "Watcher", "watch"]
