"""`python -m benchmarks`: run, merge into results.json, rewrite the table."""

from __future__ import annotations

import argparse
import ast
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
NOT_BENCHMARKS = {
    "__init__",
    "__main__",
    "comparison",
    "harness",
    "profile_step",
    "prompts",
    "record",
    "trainers",
    "processes",
    "processes_worker",
}


def names() -> dict[str, str]:
    """Every benchmark and its summary, without importing what it measures."""
    found = {}
    for path in sorted(HERE.glob("*.py")):
        if path.stem not in NOT_BENCHMARKS:
            body = ast.parse(path.read_text())
            summary = (ast.get_docstring(body) or "").splitlines()[0]
            found |= {f"{path.stem}: {size}" if size else path.stem: summary for size in _sizes(body)}
    return found


def _sizes(body: ast.Module) -> list[str]:
    """The keys of a module's `SIZES`, or one empty name."""
    for node in body.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["SIZES"]:
            return list(ast.literal_eval(node.value))
    return [""]


def parser(known: list[str]) -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    out.add_argument("--list", action="store_true", help="list the benchmarks and stop")
    out.add_argument(
        "--only", action="append", choices=known, metavar="NAME", help="run this one; may be repeated"
    )
    out.add_argument("--rounds", type=int, default=7, help="rounds of all contestants (default 7)")
    out.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="threads of torch (default: all cores)"
    )
    out.add_argument("--dry-run", action="store_true", help="print the results, write nothing")
    out.add_argument(
        "--memory-of", metavar="CONTESTANT", help="print one contestant's extra peak bytes and stop"
    )
    return out


def main() -> None:
    """Entry point."""
    known = names()
    options = parser(list(known)).parse_args()
    if options.list:
        for name, summary in known.items():
            print(f"{name:24} {summary}")
        return
    if options.rounds < 1 or options.threads < 1:
        raise SystemExit("--rounds and --threads must be at least 1")
    from benchmarks import harness, record

    chosen = options.only or list(known)
    if options.memory_of:
        print(harness.memory_of(chosen[0], options.memory_of, options.threads))
        return

    def say(text: str) -> None:
        print(text, end="" if text == "." else "\n", file=sys.stderr, flush=True)

    for name in chosen:  # saved one by one: an interrupted run keeps what it has
        results = {name: harness.run(name, rounds=options.rounds, threads=options.threads, say=say)}
        if not options.dry_run:
            record.save(results)
        print(record.table({"benchmarks": results}))


if __name__ == "__main__":
    main()
