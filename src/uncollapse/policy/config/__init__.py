"""Recipes as YAML, and YAML as recipes.

    name: mine
    base: grpo                                   # start from a registered recipe; a slot given below replaces its
    sampler: {plain-sampler: {samples: 16}}
    surrogate: {ppo-clip: {low: 0.2, high: 0.28}}
    weights: [top-entropy-tokens]                # a bare name is the stage with its paper's defaults
    mean: token                                  # or row, [trajectory, turn], {levels: [row], rows: all}, {sum: {}}
    regularizers:
      - {term: entropy-bonus, coef: {cosine: {start: 0.01, end: 0.0, steps: 200}}}

Without `base` a recipe needs `surrogate`, `advantage` and `mean`; the sampler is then `plain-sampler`. A file may
hold one recipe or a list of them. What a stage decides about itself (`needs`, `gives`) is no option.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from uncollapse.errors import ConfigError, UncollapseError, UnknownName
from uncollapse.policy.batch import PARTS
from uncollapse.policy.config.coerce import coerce
from uncollapse.policy.config.document import Located, locate, read_document, shown
from uncollapse.policy.config.names import name_of, slots_of, stages
from uncollapse.policy.recipe import Recipe, Weighted
from uncollapse.policy.reduction import Mean, Sum
from uncollapse.policy.registry import recipe, recipes
from uncollapse.policy.schedules import Schedule
from uncollapse.policy.stages.samplers import PlainSampler

_LISTS = ("rewards", "filters", "advantage", "weights")
_SINGLE = ("sampler", "surrogate", "replay")
_TEXTS = ("name", "paper", "summary")
_KEYS = (*_TEXTS, "base", *_LISTS, *_SINGLE, "mean", "regularizers")


# ---- reading -----------------------------------------------------------------------------------------------


def resolve(source: Recipe | str | Path | Mapping[str, Any]) -> Recipe:
    """A recipe from a name, a YAML file, the same as a mapping, or itself.

    Text is a path if it ends in `.yaml` or `.yml` or names a file that exists; `file.yaml:name` picks one recipe
    of a file that holds several. Raises `UnknownName` with the nearest names, `ConfigError` with file and line.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Mapping):
        return read_recipe(locate(source))
    text = str(source)
    path, _, chosen = text.rpartition(":") if _is_yaml(text.rpartition(":")[0]) else (text, "", "")
    if not (_is_yaml(path) or Path(path).is_file()):
        return recipe(text)
    found = load_recipes(path)
    if not chosen and len(found) > 1:
        raise ConfigError(f"{path} holds {len(found)} recipes; pick one as {path}:{next(iter(found))}")
    if chosen and chosen not in found:
        raise ConfigError(f"{path}: {UnknownName('recipe', chosen, found)}")
    return found[chosen] if chosen else next(iter(found.values()))


def _is_yaml(text: str) -> bool:
    return text.endswith((".yaml", ".yml"))


def load_recipes(path: str | Path) -> dict[str, Recipe]:
    """All recipes of a YAML file by name. Raises `ConfigError` with the line of what is wrong."""
    document = read_document(path)
    found: dict[str, Recipe] = {}
    for node in document if isinstance(document.value, list) else [document]:
        made = read_recipe(node)
        if made.name in found:
            raise node.error(f"a recipe named {made.name!r} stands in this file already; choose another name")
        found[made.name] = made
    if not found:
        raise document.error("no recipe in it")
    return found


def read_recipe(node: Located) -> Recipe:
    """One recipe from a document. Raises `ConfigError` with file, line and path."""
    given = node.mapping("a recipe")
    _known(node, "key", _KEYS)
    if "name" not in given:
        raise node.error("a recipe needs a `name`")
    made = _assemble(node, given)
    known = recipes().get(made.name)
    if known is not None and made != known:
        raise given["name"].error(
            f"{made.name!r} is registered already with other stages; choose another name"
        )
    return made


def _assemble(node: Located, given: dict[str, Located]) -> Recipe:
    parts: dict[str, Any] = {key: coerce(given[key], str) for key in _TEXTS if key in given}
    for key in _LISTS:
        if key in given:
            parts[key] = tuple(_stage(key, item) for item in given[key].sequence(key))
    for key in _SINGLE:
        if key in given:
            parts[key] = None if key == "replay" and given[key].value is None else _stage(key, given[key])
    if "mean" in given:
        parts["mean"] = _mean(given["mean"])
    if "regularizers" in given:
        listed = given["regularizers"].sequence("regularizers")
        parts["regularizers"] = tuple(_weighted(item) for item in listed)
    if "base" in given:
        try:
            base = recipe(coerce(given["base"], str))
        except UnknownName as error:
            raise given["base"].error(str(error)) from error
        return replace(base, **parts)
    missing = [key for key in ("surrogate", "advantage", "mean") if key not in parts]
    if missing:
        raise node.error(f"a recipe without `base` needs {', '.join(f'`{key}`' for key in missing)}")
    return Recipe(**{"paper": "", "summary": "", "sampler": PlainSampler(), **parts})


def _known(node: Located, what: str, known: tuple[str, ...]) -> None:
    for key, member in node.mapping("this").items():
        if key not in known:
            raise replace(member, path=node.path).error(str(UnknownName(what, key, known)))


def _stage(slot: str, node: Located) -> Any:
    """`name` or `{name: {options}}`."""
    if isinstance(node.value, str):
        name, options = node.value, replace(node, value={}, path=f"{node.path}.{node.value}")
    elif isinstance(node.value, dict) and len(node.value) == 1:
        ((name, options),) = node.value.items()
        options = replace(options, value={}) if options.value is None else options
    else:
        raise node.error(f"expected a stage, as `name` or `{{name: {{options}}}}`, got {shown(node)}")
    known = stages(slot)
    if name not in known:
        elsewhere = slots_of(name)
        hint = f"; {name!r} belongs under {' or '.join(elsewhere)}" if elsewhere else ""
        message = (
            f"no {slot} stage {name!r}{hint}" if hint else str(UnknownName(f"{slot} stage", name, known))
        )
        raise node.error(message)
    return _build(known[name], options)


def _build(kind: type, node: Located) -> Any:
    allowed = options_of(kind)
    _known(node, "option", tuple(allowed))
    hints = get_type_hints(kind)
    given = node.mapping("options")
    values = {
        name: _schedule(member) if hints[name] == Schedule else coerce(member, hints[name])
        for name, member in given.items()
    }
    missing = [name for name, item in allowed.items() if _required(item) and name not in values]
    if missing:
        raise node.error(f"needs {', '.join(missing)}")
    try:
        return kind(**values)
    except UncollapseError as error:
        raise node.error(str(error)) from error


def _required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def options_of(kind: type) -> dict[str, Field[Any]]:
    """The fields of a stage that a user may set: all but what it decides about itself."""
    hints = get_type_hints(kind)
    fixed = {"needs", "gives"} | ({"scope"} if hints.get("scope") is type(None) else set())
    return {item.name: item for item in fields(kind) if item.init and item.name not in fixed}


def _schedule(node: Located) -> Schedule:
    value: Schedule = coerce(node, float) if not isinstance(node.value, dict) else _stage("schedule", node)
    return value


def _mean(node: Located) -> Mean | Sum:
    if node.value == "token":
        return Mean()
    if isinstance(node.value, str):
        return Mean((node.value,))
    if isinstance(node.value, list):
        return Mean(coerce(node, tuple[str, ...]))
    if isinstance(node.value, dict) and set(node.value) == {"sum"}:
        options = node.value["sum"]
        return _build(Sum, replace(options, value={}) if options.value is None else options)  # type: ignore[no-any-return]
    if isinstance(node.value, dict):
        return _build(Mean, node)  # type: ignore[no-any-return]
    raise node.error(
        f"expected token, row, a list of levels, {{levels: ...}} or {{sum: ...}}, got {shown(node)}"
    )


def _weighted(node: Located) -> Weighted:
    given = node.value
    if not isinstance(given, dict) or "term" not in given:
        return Weighted(_stage("regularizers", node))
    _known(node, "key", ("term", "coef", "mean", "parts"))
    values: dict[str, Any] = {"term": _stage("regularizers", given["term"])}
    if "coef" in given:
        values["coef"] = _schedule(given["coef"])
    if "mean" in given:
        values["mean"] = _mean(given["mean"])
    if "parts" in given:
        values["parts"] = coerce(given["parts"], frozenset[str])
        for part in sorted(values["parts"] - set(PARTS)):
            raise given["parts"].error(str(UnknownName("part", part, PARTS)))
    return Weighted(**values)


# ---- writing -----------------------------------------------------------------------------------------------


def recipe_to_dict(made: Recipe) -> dict[str, Any]:
    """The fully resolved recipe as plain YAML values, every option spelled out; `resolve` reads it back equal."""
    data: dict[str, Any] = {key: getattr(made, key) for key in _TEXTS}
    data["sampler"] = stage_to_plain("sampler", made.sampler)
    for slot in _LISTS:
        data[slot] = [stage_to_plain(slot, stage) for stage in getattr(made, slot)]
    data["surrogate"] = stage_to_plain("surrogate", made.surrogate)
    data["mean"] = mean_to_plain(made.mean)
    data["regularizers"] = [
        {
            "term": stage_to_plain("regularizers", weighted.term),
            "coef": _number(weighted.coef),
            "mean": mean_to_plain(weighted.mean),
            "parts": sorted(weighted.parts),
        }
        for weighted in made.regularizers
    ]
    if made.replay is not None:
        data["replay"] = stage_to_plain("replay", made.replay)
    return data


def recipe_to_yaml(made: Recipe) -> str:
    """The fully resolved recipe as YAML."""
    text: str = yaml.safe_dump(
        recipe_to_dict(made), sort_keys=False, allow_unicode=True, default_flow_style=None
    )
    return text


def stage_to_plain(slot: str, stage: Any) -> str | dict[str, Any]:
    """A stage as YAML writes it: its name, with all its options if it has any."""
    name = name_of(slot, stage)
    options = {item: _plain(getattr(stage, item)) for item in options_of(type(stage))}
    return {name: options} if options else name


def mean_to_plain(mean: Mean | Sum) -> str | dict[str, Any]:
    """A reduction as YAML writes it."""
    if isinstance(mean, Sum):
        return {"sum": {"divisor": mean.divisor, "per_row": mean.per_row}}
    if mean == Mean():
        return "token"
    joint = {"joint": True} if mean.joint else {}
    return {"levels": list(mean.levels), "rows": mean.rows, **joint}


def _number(schedule: Schedule) -> float | str | dict[str, Any]:
    return stage_to_plain("schedule", schedule) if callable(schedule) else schedule


def _plain(value: Any) -> Any:
    if callable(value):
        return stage_to_plain("schedule", value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return sorted(value) if isinstance(value, frozenset) else value
