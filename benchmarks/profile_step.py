"""Where the time of a training step goes: by part of the step, and within each by what bounds it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

PARTS = ("generate", "forward", "backward", "optimiser")
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "mkldnn::_linear_pointwise", "aten::matmul"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "random numbers": ("aten::exponential_", "aten::multinomial"),
}  # fmt: skip
"""Operators by what they are; all others move or change memory element by element."""


@contextmanager
def _marked(owner: Any, name: str, part: str) -> Iterator[None]:
    """Mark calls of a method as one part of the step."""
    own = name in vars(owner)
    original = getattr(owner, name)

    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"part/{part}"):
            return original(*args, **kwargs)

    setattr(owner, name, marked)
    try:
        yield
    finally:
        setattr(owner, name, original) if own else delattr(owner, name)


def profiled(trainer: Any, run: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of one `run` by part of the step and by kind of work; `Python` is what no operator accounts for."""
    import torch

    with (
        _marked(trainer, "_generate_single_turn", "generate"),
        _marked(trainer, "compute_loss", "forward"),
        _marked(trainer, "_get_per_token_logps_and_entropies", "forward"),
        _marked(trainer.accelerator, "backward", "backward"),
        _marked(torch.optim.AdamW, "step", "optimiser"),
        profile(activities=[ProfilerActivity.CPU]) as record,
    ):
        start = time.perf_counter()
        run()
        wall = time.perf_counter() - start
    return _table(record.events(), wall)


def _table(events: Any, wall: float) -> dict[str, Any]:
    marks = [
        (e.time_range.start, e.time_range.end, e.name.removeprefix("part/"))
        for e in events
        if e.name.startswith("part/")
    ]
    # A marked method may call another one: the outer one counts.
    spans = [m for m in marks if not any(o is not m and o[0] <= m[0] and m[1] <= o[1] for o in marks)]
    kind_of = {name: kind for kind, names in KINDS.items() for name in names}
    seconds: dict[str, dict[str, float]] = {}
    total = {part: sum(end - start for start, end, name in spans if name == part) / 1e6 for part in PARTS}
    for event in events:
        if event.name.startswith("part/") or event.self_cpu_time_total <= 0:
            continue
        part = next((name for start, end, name in spans if start <= event.time_range.start < end), "rest")
        row = seconds.setdefault(part, {})
        kind = kind_of.get(event.name, "memory traffic")
        row[kind] = row.get(kind, 0.0) + event.self_cpu_time_total / 1e6
    total["rest"] = wall - sum(total.values())
    return {
        part: {"seconds": round(length, 3)}
        | {kind: round(value, 3) for kind, value in sorted(seconds.get(part, {}).items())}
        | {"Python": round(max(length - sum(seconds.get(part, {}).values()), 0.0), 3)}
        for part, length in total.items()
    }
