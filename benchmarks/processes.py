"""One optimiser step in one and in two processes, and how its parts grow with the rows of a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

SUMMARY = (
    "One rollout with one optimiser step (`grpo`, SmolLM2-135M, prompts of reasoning-gym, G=8) in one and in two "
    "processes of one thread each, and in one process with half of the rows. *step* is the median over steps after the "
    "first; *generate*, *score and update* and *wait and exchange* are parts of it, *rest* is what is left. "
    "*all-reduce* is one sum over the processes of as many numbers as the model has parameters."
)
WORKER = Path(__file__).with_name("processes_worker.py")
ROWS = 32
CASES = {"1 process": (1, ROWS), "1 process, half of the rows": (1, ROWS // 2), "2 processes": (2, ROWS)}


def measure(steps: int, model: str = "smollm2-135m") -> dict[str, Any]:
    """Run every case in processes of its own; the parts of a step in seconds, on the leading process."""
    rows = {name: _run(model, processes, count, steps) for name, (processes, count) in CASES.items()}
    return {
        "summary": SUMMARY,
        "model": model,
        "rows": ROWS,
        "steps": steps,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cases": rows,
    }


def _run(model: str, processes: int, rows: int, steps: int) -> dict[str, float]:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "parts.json")
        command = [*launcher, str(WORKER), model, str(rows), str(steps), str(output)]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        return dict(json.loads(output.read_text()))


def predicted(cases: dict[str, dict[str, float]], processes: int) -> float:
    """Seconds of a step in so many processes, from the cases of one process and the exchange of two.

    Each part of a step is a line in the rows of a process, through its values at all and at half of the rows: decoding
    reads the weights whatever the rows, so that halving the rows does not halve it. The sum over processes moves
    2 (N - 1) / N times the size of the gradient through each, as in a ring.
    """
    whole, half, two = cases["1 process"], cases["1 process, half of the rows"], cases["2 processes"]
    seconds = 0.0
    for part in ("generate", "score and update", "rest"):
        slope = 2 * (whole[part] - half[part])
        fixed = whole[part] - slope
        seconds += fixed + slope / processes
    return seconds + (0.0 if processes == 1 else two["all-reduce"] * 2 * (processes - 1) / processes)


def table(result: dict[str, Any]) -> str:
    """Markdown: what was measured, what the cost model says of it, and what it says beyond (labelled)."""
    parts = ("step", "generate", "score and update", "wait and exchange", "rest", "all-reduce")
    cases = result["cases"]
    lines = [
        result["summary"],
        "",
        f"{result['model']}, {result['rows']} rows, {result['steps']} steps; {result['date'][:10]}.",
        "",
        "| measured, seconds | " + " | ".join(parts) + " |",
        "|" + " --- |" * (len(parts) + 1),
        *(
            f"| {name} | " + " | ".join(f"{case[part]:.3f}" for part in parts) + " |"
            for name, case in cases.items()
        ),
        "",
        "| processes | step by the cost model, s | times as fast as one | |",
        "| --- | --- | --- | --- |",
    ]
    for count in (1, 2, 4, 8, 16, 32):
        seconds = predicted(cases, count)
        note = (
            f"measured: {cases[f'{count} process' + 'es' * (count > 1)]['step']:.3f} s"
            if count <= 2
            else "extrapolated, not measured"
        )
        lines.append(f"| {count} | {seconds:.3f} | {predicted(cases, 1) / seconds:.2f} | {note} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and keep the result beside the other benchmarks'."""
    import argparse

    from benchmarks import record

    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes", description=__doc__)
    parser.add_argument("--steps", type=int, default=6, help="steps per case, of which the first warms up")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dry-run", action="store_true", help="print the result, write nothing")
    options = parser.parse_args()
    if options.steps < 2:
        raise SystemExit("--steps must be at least 2: the first warms up")
    result = measure(options.steps, options.model)
    if not options.dry_run:
        kept = record.load(record.HERE / "results.json")
        kept["processes"] = result
        record.write(record.HERE / "results.json", json.dumps(kept, indent=2) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
