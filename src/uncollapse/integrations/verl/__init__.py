"""Every recipe in verl, at the lowest level that expresses it exactly; checked against verl 0.9.1.

Importing this package registers, for each registered recipe that verl's registries express, an advantage estimator
and a policy loss named `uncollapse/<recipe>`. Let every process of a run do so with

    VERL_USE_EXTERNAL_MODULES=uncollapse.integrations.verl

All other recipes need our trainer: `python -m uncollapse.integrations.verl.main uncollapse.recipe=clip-cov ...`,
which launches a recipe of any level. See the page on verl in the documentation.
"""

from __future__ import annotations

from uncollapse.errors import MissingExtra

try:
    from uncollapse.integrations.verl.registries import register_all, register_recipe
except ModuleNotFoundError as error:
    if (error.name or "").startswith("uncollapse"):
        raise
    raise MissingExtra(error.name or "verl", "verl") from error

register_all()

__all__ = ["register_all", "register_recipe"]
