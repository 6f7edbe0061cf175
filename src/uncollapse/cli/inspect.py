"""`uncollapse inspect`: what the attention, features, classes and weights of a model are like."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uncollapse.cli.bar import Bar
from uncollapse.cli.catalogue import AsJson
from uncollapse.cli.output import as_json, note, say, table
from uncollapse.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from uncollapse.inspection import Inspection

_COLUMNS = ("text", "prompt", "content", "question", "sentence")
_LABELS = ("label", "labels", "class")
_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def inspect(
    model: str = "smollm2-135m",
    /,
    *,
    data: str | None = None,
    column: str | None = None,
    label: str | None = None,
    tokens: int = 8192,
    texts: int = 1024,
    length: int = 256,
    batch: int = 4,
    attention: str | None = None,
    weights: bool = True,
    html: Path | None = None,
    json_: AsJson = False,
) -> None:
    """Look into a model: attention entropy per head, spread of features, neural collapse at the head, spectra of weights.

    Works for causal and masked language models and text classifiers of Hugging Face, with eager, SDPA or flash attention: entropies are
    recomputed from queries and keys, a few rows at a time. From Python, for any torch model: `with uncollapse.watch(model):`.

    Examples: `uncollapse inspect smollm2-135m --html page.html`; `uncollapse inspect ./checkpoint-500 --data corpus.jsonl`;
    `uncollapse inspect ./classifier --data test.csv --label label --json`.

    Parameters
    ----------
    model
        A name (`tiny`, `smollm2-135m`), a directory that `save_pretrained` wrote, or a Hub id.
    data
        What the model reads: a text file, CSV, JSONL or Parquet, or a data set of the Hub as NAME or NAME:SPLIT. By default the
        sources of Python's standard library, which every machine has.
    column
        The column with the text (default: the first of text, prompt, content, question, sentence).
    label
        The column with the class, for classifiers (default: label, labels or class): numbers, or names that the model's
        configuration knows.
    tokens
        Tokens that a language model reads, from the start of the data.
    texts
        Labelled texts that a classifier reads, drawn from all of the data with a fixed seed.
    length
        Tokens of a row; a classifier reads so many of a text.
    batch
        Rows of a forward pass.
    attention
        Implementation to load the model with: eager, sdpa, flash_attention_2 (default: the model's own).
    weights
        Compute the spectra of the weights too; seconds for a hundred million of them.
    html
        Write a page with figures to this file.
    """
    from uncollapse.integrations.inspecting import inspect_labelled, inspect_text

    loaded, tokenizer, classifies = _load(model, attention)
    options: dict[str, Any] = {"length": length, "batch": batch, "weights": weights}
    if classifies:
        if texts < 1:
            raise ConfigError(f"--texts takes a number from 1, got {texts}")
        read, classes, source = _labelled(data, column, label, loaded.config.label2id)
        kept = sorted(random.Random(0).sample(range(len(read)), min(texts, len(read))))
        with Bar("texts") as progress:
            found = inspect_labelled(
                loaded,
                tokenizer,
                [read[i] for i in kept],
                [classes[i] for i in kept],
                progress=progress,
                **options,
            )
    else:
        read, source = _plain(data, column)
        with Bar("tokens") as progress:
            found = inspect_text(loaded, tokenizer, read, tokens=tokens, progress=progress, **options)
    if json_:
        as_json(
            {
                "schema": 1,
                "model": model,
                "data": source,
                **_tables(found),
                "absent": dict(found.absent),
            }
        )
    else:
        _print(found, model, source)
    if html is not None:
        from uncollapse.report import inspection

        note(f"page: {inspection.write(html, found, source=source)}")


def _load(model: str, attention: str | None) -> tuple[Any, Any, bool]:
    from uncollapse.models import load_as_saved

    loaded, tokenizer = load_as_saved(model)
    if attention is not None:
        try:
            loaded.set_attn_implementation(attention)
        except (ImportError, ValueError, KeyError) as error:
            raise ConfigError(f"--attention {attention}: {' '.join(str(error).split())[:160]}") from error
    return loaded, tokenizer, type(loaded).__name__.endswith("ForSequenceClassification")


def _plain(data: str | None, column: str | None) -> tuple[list[str], str]:
    """Texts for a language model and what to call them."""
    if data is None:
        from uncollapse.studies.testbeds.text import source_files

        sources = [path.read_text(encoding="utf-8", errors="replace") for path in source_files()]
        return [text for text in sources if text], "sources of Python's standard library"
    path = Path(data).expanduser()
    if path.is_file() and path.suffix.lower() not in _FORMATS:
        return [path.read_text(encoding="utf-8", errors="replace")], path.name
    rows = _rows(data, path)
    name = _column(rows, column, _COLUMNS, "--column")
    return [str(text) for text in rows[name] if text is not None], data


def _labelled(
    data: str | None, column: str | None, label: str | None, known: Mapping[str, int]
) -> tuple[list[str], list[int], str]:
    """Texts, their classes and what to call them; rows without a text are left out. `known`: names of classes."""
    if data is None:
        raise ConfigError("a classifier needs labelled texts; give them with --data FILE")
    path = Path(data).expanduser()
    if path.is_file() and path.suffix.lower() not in _FORMATS:
        raise ConfigError(f"{path}: a classifier needs labelled texts, as CSV, JSONL or Parquet")
    rows = _rows(data, path)
    texts, values = (
        rows[_column(rows, column, _COLUMNS, "--column")],
        rows[_column(rows, label, _LABELS, "--label")],
    )
    pairs = [
        (str(text), known.get(value, value))
        for text, value in zip(texts, values, strict=True)
        if text is not None
    ]
    for _, value in pairs:
        if not isinstance(value, int) or value < 0:
            raise DataError(
                f"{data}: {value!r} is no class; give numbers from 0, or names of the model: {', '.join(known)[:120]}"
            )
    return [text for text, _ in pairs], [value for _, value in pairs], data


def _rows(data: str, path: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    name, _, split = data.partition(":")
    if not path.is_file() and (
        path.suffix.lower() in (*_FORMATS, ".txt") or path.is_absolute() or name.count("/") > 1
    ):
        raise DataError(f"{data} does not exist")  # no name of a data set: the Hub need not be asked
    try:
        if path.is_file():
            kind = _FORMATS[path.suffix.lower()]
            return datasets.load_dataset(kind, data_files=str(path), split="train")
        return datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # pyarrow, pandas and the Hub each raise kinds of their own
        raise DataError(
            f"{data}: neither a file nor a data set that can be read: {' '.join(str(error).split())[:160]}"
        ) from error


def _column(rows: Any, given: str | None, usual: Sequence[str], option: str) -> str:
    names = list(rows.column_names)
    wanted = usual if given is None else (given,)
    for name in wanted:
        if name in names:
            return name
    raise ConfigError(f"no column {' or '.join(wanted)}; name one of {', '.join(names)} with {option}")


def _print(found: Inspection, model: str, source: str) -> None:
    from uncollapse.report.inspection import headline, key_figures

    say(f"{headline(found)} ({model}, {source})")
    say("")
    table(["", ""], list(key_figures(found).items()))
    if found.heads:
        say("")
        _print_layers(found)
    for what, reason in found.absent.items():
        note(f"{what}: {reason}")


def _print_layers(found: Inspection) -> None:
    rows = []
    for layer, one in found.heads.items():
        kinds = [f"{int(getattr(one, kind).sum())} {kind}" for kind in ("collapsed", "sink", "uniform")]
        told = ", ".join(kind for kind in kinds if not kind.startswith("0 "))
        norm = found.logit_norms.get(layer)
        numbers = [float(one.normalized.nanmean()), float(one.normalized.amin()), float(one.first.nanmean())]
        cells = [f"{number:.3f}" for number in numbers] + [
            "-" if norm is None else f"{float(norm.amax()):.3g}"
        ]
        rows.append([layer, *cells, told])
    table(["layer", "entropy / uniform", "lowest head", "first key", "logit norm", "heads"], rows)


def _tables(found: Inspection) -> dict[str, Any]:
    """Scalars, heads and logit norms by layer, and weights; null where a number is not defined."""
    return {
        "scalars": {name: _defined(value) for name, value in found.scalars(by_layer=True).items()},
        "heads": {
            layer: {one.name: _list(getattr(heads, one.name)) for one in fields(heads)}
            for layer, heads in found.heads.items()
        },
        "logit_norms": {layer: _list(norms) for layer, norms in found.logit_norms.items()},
        "weights": [
            {name: _defined(value) for name, value in asdict(weight).items()} for weight in found.weights
        ],
    }


def _list(values: Tensor) -> list[Any]:
    return [_defined(value) for value in values.tolist()]


def _defined(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
