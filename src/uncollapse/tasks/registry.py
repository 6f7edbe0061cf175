"""Tasks by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from uncollapse.errors import ConfigError, UnknownName
from uncollapse.tasks.countdown import countdown
from uncollapse.tasks.datasets import from_dataset, is_data_source
from uncollapse.tasks.gym import PREFIX, gym_names, gym_task
from uncollapse.tasks.modsum import modsum
from uncollapse.tasks.running_maximum import running_maximum
from uncollapse.tasks.task import Task

_FACTORIES: dict[str, Callable[..., Task]] = {}


def register_task(name: str, factory: Callable[..., Task]) -> None:
    """Make a task known by a name of its own.

    Args:
        name: new name, without a colon, a slash or the suffix of a data file.
        factory: keyword options -> task.

    Raises:
        ConfigError: the name is taken or would be read as something else.
    """
    if name in _FACTORIES:
        raise ConfigError(f"task {name!r} is already registered; choose another name")
    if name.startswith(PREFIX) or is_data_source(name):
        raise ConfigError(
            f"task {name!r} would be read as a reasoning-gym data set or a data file; choose another name"
        )
    _FACTORIES[name] = factory


def task(name: str, **options: Any) -> Task:
    """The task of a name.

    Args:
        name: one of `task_names()`; or a data source (`rows.jsonl`, `rows.parquet`, `owner/name`), see
            `from_dataset`.
        **options: the task's own options, for example `digits=4` for `modsum`.

    Raises:
        UnknownName: no task has the name; carries the nearest names.
        ConfigError: an option is unknown or out of range.
    """
    if name.startswith(PREFIX):
        return gym_task(name.removeprefix(PREFIX), **options)
    factory = _FACTORIES.get(name)
    if factory is None:
        if not is_data_source(name):
            raise UnknownName("task", name, task_names())
        return from_dataset(name, **options)
    try:
        return factory(**options)
    except TypeError as error:
        raise ConfigError(f"task {name!r}: {error}") from error


def tasks() -> dict[str, str]:
    """Every name with its summary, in the order of `task_names`; nothing is built from reasoning-gym."""
    own = {name: _FACTORIES[name]().summary for name in sorted(_FACTORIES)}
    return {
        **own,
        **{name: f"reasoning-gym's {name.removeprefix(PREFIX).replace('_', ' ')}" for name in gym_names()},
    }


def task_names() -> list[str]:
    """Own tasks, then every reasoning-gym data set if reasoning-gym is installed."""
    return [*sorted(_FACTORIES), *gym_names()]


register_task("countdown", countdown)
register_task("modsum", modsum)
register_task("running-maximum", running_maximum)
