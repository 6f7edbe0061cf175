"""What flows through a model while it runs: hooks on attention, features and weights, for any PyTorch model.

`watch(model)` gathers everything; the modules beneath have its parts.
"""

from uncollapse.inspection.watcher import Inspection, Watcher, watch

__all__ = ["Inspection", "Watcher", "watch"]
