"""Every recipe in verl, at the lowest level that expresses it exactly; checked against verl 0.9.1.

Importing this package registers, for each registered recipe that verl's registries express, an advantage estimator
and a policy loss named `uncollapse/<recipe>`. Let every process of a run do so with

    VERL_USE_EXTERNAL_MODULES=uncollapse.integrations.verl

All other recipes need our trainer: `python -m uncollapse.integrations.verl.main uncollapse.recipe=clip-cov ...`,
which launches a recipe of any level. See the page on verl in the documentation.
"""

from __future__ import annotations

import warnings

from uncollapse.errors import MissingExtra

CHECKED = "0.9.1"
"""The release that every seam was checked against."""

try:
    import verl

    from uncollapse.integrations.verl.registries import register_all, register_recipe
except ModuleNotFoundError as error:
    if (error.name or "").startswith("uncollapse"):
        raise
    raise MissingExtra((error.name or "verl").partition(".")[0], "verl") from error

if verl.__version__ != CHECKED:
    warnings.warn(
        f"verl {verl.__version__} is installed; recipes in verl are checked against {CHECKED} only",
        stacklevel=2,
    )

register_all()

__all__ = ["CHECKED", "register_all", "register_recipe"]
