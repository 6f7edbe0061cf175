"""The page of an inspection: what the attention heads, features, classes and weights of a model are like."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from uncollapse.inspection import Inspection
from uncollapse.inspection.attention import COLLAPSED, SINK, UNIFORM, head_table, marked_heads
from uncollapse.report import figures, page, sections
from uncollapse.report.blocks import Block, Section, TableBlock, TextBlock, Tile, figure
from uncollapse.report.palette import LIGHT
from uncollapse.report.series import Curve
from uncollapse.report.words import level, number, percent
from uncollapse.runs import write_text

_STEPS = (COLLAPSED, 0.2, 0.4, 0.6, 0.8, UNIFORM)
_COLOURS = tuple(LIGHT[role] for role in ("s2", "t5", "t4", "t3", "t2", "t1", "s5"))
_MASS = (0.05, 0.2, SINK, 0.8)
_MASS_COLOURS = tuple(LIGHT[role] for role in ("faint", "t1", "t2", "t4", "t5"))
_SHOWN = 12
"""Heads or weights in a table; the figures show all."""

_MEANING = {
    "nc1/cdnv/mean": "NC1: spread within classes over distance between them, mean over pairs; 0 when every class is a point",
    "nc1/ratio": "NC1: mean variance within classes over mean squared distance between class means",
    "nc1/pinv": "NC1: tr(within pinv(between)) over classes; 0 when every class is a point",
    "nc2/norm/cov": "NC2: how unequal the lengths of class means are; 0 when equal",
    "nc2/cosine/mean": "NC2: mean cosine of two class means; -1/(classes - 1) in a simplex",
    "nc2/cosine/std": "NC2: its spread; 0 when all angles are equal",
    "gnc2/log_kernel/mean": "GNC2: energy of the directions; ln(1/sqrt 2) = -0.347 when they are spread over the sphere",
    "gnc2/log_kernel/cov": "GNC2: how uneven that is; 0 when uniform",
    "nc3/cosine/mean": "NC3: mean cosine of a class mean and its row of the head; 1 when they are the same direction",
    "unc3/cosine/cov": "UNC3: how uneven that alignment is; 0 when uniform",
    "nc4/full_head": "NC4: share of samples that the head gives the class of the nearest mean; 1 when it decides like that",
    "nc4/seen_head": "NC4: the same, the head choosing among the classes seen",
    "nc4/head_accuracy": "share of samples that the head gives their class",
    "nc4/centre_accuracy": "share of samples whose nearest class mean is that of their class",
}


def render(found: Inspection, *, source: str = "") -> str:
    """The page as HTML; `source` says what the model read."""
    return page.fill(
        eyebrow=" \u00b7 ".join(part for part in ("Inspection", found.model, source) if part),
        title=headline(found),
        lead=_lead(found),
        tiles=_tiles(found),
        parts=[_attention(found), _features(found), _classes(found), _weights(found)],
    )


def write(path: str | os.PathLike[str], found: Inspection, *, source: str = "") -> Path:
    """Write the page to a file; returns where it is.

    Raises `DataError` if the file cannot be written.
    """
    return write_text(Path(path), render(found, source=source))


def headline(found: Inspection) -> str:
    """The finding about attention in one sentence."""
    if not found.heads:
        return "No attention was seen"
    table = marked_heads(found.heads)
    count = len(table["collapsed"])
    ill, sinks, uniform = (int(table[kind].sum()) for kind in ("collapsed", "sink", "uniform"))
    said = [f"{ill} of {count} heads have collapsed" if ill else "No head has collapsed"]
    if sinks and not ill:
        said.append(f"{sinks} of {count} rest on the first key")
    if uniform:
        said.append(f"{uniform} of {count} are nearly uniform")
    return "; ".join(said)


def _lead(found: Inspection) -> list[str]:
    lead = []
    if found.heads:
        mean = float(head_table(found.heads)["normalized"].nanmean())
        lead.append(
            f"A row of attention spreads over {percent(mean)} of what it could, measured by entropy: 0 is a single key, 100\u202f% all "
            "keys alike."
        )
    if found.blocks:
        first, *_, last = [*found.blocks.values()] * 2
        lead.append(
            f"Features use {number(last.effective_rank)} of {last.width} dimensions behind the last block, "
            f"{number(first.effective_rank)} behind the first."
        )
    return lead


def _tiles(found: Inspection) -> list[Tile]:
    tiles = [Tile("Parameters", _millions(found.parameters), "", found.model, "")]
    if found.heads:
        table, marks = head_table(found.heads), marked_heads(found.heads)
        profile = table["normalized"].nanmean(dim=1).numpy()
        spark = sections.spark(np.arange(len(profile), dtype=float), profile)
        heads = f"{len(found.heads)} layers, {len(marks['sink'])} heads"
        tiles.append(
            Tile("Attention entropy", percent(float(np.nanmean(profile))), "of uniform", heads, spark)
        )
        note = f"{int(marks['sink'].sum())} sinks, {int(marks['uniform'].sum())} nearly uniform"
        tiles.append(Tile("Collapsed heads", str(int(marks["collapsed"].sum())), "", note, ""))
    if found.blocks:
        ranks = [one.effective_rank for one in found.blocks.values()]
        spark = sections.spark(np.arange(len(ranks), dtype=float), np.array(ranks))
        last = list(found.blocks.values())[-1]
        tiles.append(
            Tile(
                "Effective rank",
                number(ranks[-1]),
                f"of {last.width}",
                "features behind the last block",
                spark,
            )
        )
    if found.collapse is not None:
        value = found.collapse["nc1/cdnv/mean"]
        tiles.append(
            Tile(
                "Within / between",
                level(value),
                "CDNV",
                f"{found.collapse.classes:,} classes at the head",
                "",
            )
        )
    return tiles


def _attention(found: Inspection) -> Section:
    if not found.heads:
        return Section(
            "attention",
            "Attention",
            "Attention",
            missing=found.absent.get("attention", "It was not watched."),
        )
    table = {name: values.numpy() for name, values in head_table(found.heads).items()}
    layers = list(found.heads)

    def draw(axes: Sequence[Axes]) -> None:
        heads, mass = "Entropy of each head", "Mass on the first key"
        across = "head (across), layer (down)"
        figures.cells(
            table["normalized"], axes[0], title=heads, xlabel=across, steps=_STEPS, colours=_COLOURS
        )
        figures.cells(table["first"], axes[1], title=mass, xlabel=across, steps=_MASS, colours=_MASS_COLOURS)

    def lines(axes: Sequence[Axes]) -> None:
        place = np.arange(len(layers), dtype=np.float64)
        mean, low, high = (
            reduce(table["normalized"], axis=1) for reduce in (np.nanmean, np.nanmin, np.nanmax)
        )
        figures.curves(
            [Curve("mean of the heads", place, mean, low=low, high=high)], axes[0], title="Entropy by layer", unit="of uniform",
            share=True, xlabel="layer", label=False,
        )  # fmt: skip
        if found.logit_norms:
            norms = np.array([float(norm.amax()) for norm in found.logit_norms.values()])
            figures.curves(
                [Curve("largest head", np.arange(len(norms), dtype=np.float64), norms)], axes[1], title="Norm of the logit map",
                unit="largest head", xlabel="layer", label=False,
            )  # fmt: skip

    height = max(220, min(760, 18 * len(layers) + 90))
    blocks: list[Block] = [
        figure(
            "heads", draw, alt="Entropy and mass on the first key of every head", panels=2, columns=2, height=height,
            caption="One cell a head. Left: orange heads look at one key, yellow ones at all alike. Right: a head whose rows rest on the first "
            f"key (at least {percent(SINK)} of the mass) is an attention sink: usual, and not counted as collapsed.",
        ),
        figure(
            "layers", lines, alt="Attention entropy by layer", panels=2 if found.logit_norms else 1, columns=2,
            caption="Left: mean over heads, with the range from the lowest head to the highest. Right: the spectral norm of "
            "query times key weights, which bounds how sharp attention can become.",
        ),
        _head_rows(found),
    ]  # fmt: skip
    return Section("attention", "Attention", "Attention", blocks=tuple(blocks))


def _head_rows(found: Inspection) -> TableBlock:
    rows = [
        (float(one.normalized[head]), layer, head)
        for layer, one in found.heads.items()
        for head in range(len(one.normalized))
        if not math.isnan(float(one.normalized[head]))
    ]
    rows.sort()
    shown = []
    for _, layer, head in rows[:_SHOWN]:
        one = found.heads[layer]
        kind = "sink" if one.sink[head] else "collapsed" if one.collapsed[head] else ""
        shown.append(
            (
                f"{layer} \u00b7 {head}",
                percent(float(one.normalized[head])),
                f"{float(one.entropy[head]):.3f}",
                percent(float(one.peak[head])),
                percent(float(one.first[head])),
                kind,
            )
        )
    return TableBlock(
        ("layer \u00b7 head", "of uniform", "entropy (nats)", "largest key", "first key", ""),
        tuple(shown),
        "The sharpest heads.",
    )


def _features(found: Inspection) -> Section:
    if not found.blocks:
        return Section(
            "features",
            "Features",
            "Features",
            missing=found.absent.get("features", "They were not watched."),
        )
    ranks = np.array([one.effective_rank for one in found.blocks.values()])
    part = np.array([one.participation for one in found.blocks.values()])
    place = np.arange(len(ranks), dtype=np.float64)
    width = next(iter(found.blocks.values())).width

    def draw(axes: Sequence[Axes]) -> None:
        figures.curves(
            [Curve("effective rank", place, ranks), Curve("participation ratio", place, part)], axes[0],
            title="Dimensions in use", unit=f"of {width}", xlabel="block",
        )  # fmt: skip

    caption = (
        "Output of each block about its mean. Effective rank counts directions by the entropy of the singular values; the participation "
        "ratio looks at variance and so is governed by the few largest directions."
    )
    return Section(
        "features", "Features", "Features",
        blocks=(figure("ranks", draw, alt="Effective rank of the features of each block", caption=caption),),
    )  # fmt: skip


def _classes(found: Inspection) -> Section:
    title = "Classes at the head"
    if found.collapse is None:
        return Section(
            "classes", "Classes", title, missing=found.absent.get("classes", "They were not watched.")
        )
    report, values = found.collapse, found.scalars()
    rows = tuple(
        (meaning, name, number(values[name])) for name, meaning in _MEANING.items() if name in values
    )
    lead = (
        f"{report.samples:,} features of {report.classes:,} classes ({report.singletons:,} of them with one sample). "
        "For a causal language model the class is the next token."
    )
    blocks: list[Block] = [TableBlock(("what it says", "metric", "value"), rows)]
    if found.frames is not None:
        frames = tuple((name, number(value)) for name, value in found.frames.metrics().items())
        blocks.append(
            TableBlock(
                ("classical metric", "value"), frames, "Simplex and orthogonal frames; 0 means collapsed."
            )
        )
        if found.frames.degenerate:
            blocks.append(
                TextBlock("What was odd about the input: " + ", ".join(found.frames.degenerate) + ".")
            )
    return Section("classes", "Classes", title, lead=lead, blocks=tuple(blocks))


def _weights(found: Inspection) -> Section:
    if not found.weights:
        return Section(
            "weights",
            "Weights",
            "Weights",
            missing=found.absent.get("weights", "Their spectra were not asked for."),
        )
    by_norm = sorted(found.weights, key=lambda one: -one.spectral_norm)[:_SHOWN]
    by_rank = sorted(found.weights, key=lambda one: one.effective_rank / min(one.shape))[:_SHOWN]
    columns = ("weight", "shape", "spectral norm", "effective rank", "stable rank")
    tables = [
        TableBlock(
            columns,
            tuple(
                (
                    one.name, "\u00d7".join(map(str, one.shape)), number(one.spectral_norm),
                    f"{one.effective_rank:.1f} ({percent(one.effective_rank / min(one.shape))})", number(one.stable_rank),
                )
                for one in chosen
            ),
            caption,
        )
        for chosen, caption in ((by_norm, "Largest spectral norms."), (by_rank, "Least effective rank for their size."))
    ]  # fmt: skip
    return Section(
        "weights", "Weights", "Weights", lead=f"{len(found.weights)} matrices.", blocks=tuple(tables)
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


def key_figures(found: Inspection) -> Mapping[str, str]:
    """The key figures of the page as text, for a terminal."""
    return {
        tile.label: " ".join(part for part in (tile.value, tile.unit, f"({tile.note})") if part)
        for tile in _tiles(found)
    }
