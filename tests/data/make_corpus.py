"""Make the seeds of `corpus`: every kind of damage to a valid log of every format. `python tests/data/make_corpus.py`."""

from __future__ import annotations

import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
SIZE = 3000
LOGS = {
    "events.out.tfevents.1": "collapse/tensorboard/*tfevents*",
    "run.wandb": "collapse/wandb/*/*.wandb",
    "trainer_state.json": "collapse/checkpoint-30/trainer_state.json",
    "verl.jsonl": "collapse/verl.jsonl",
    "verl.log": "collapse/verl_console.log",
    "export.csv": "collapse/wandb_export.csv",
    "table.csv": "collapse/table.csv",
}


def damages(data: bytes, generator: random.Random) -> dict[str, bytes]:
    """The same log with bits flipped, a piece cut out, put in twice, overwritten or replaced, and without its end."""
    at = [generator.randrange(20, len(data) - 200) for _ in range(8)]
    flipped = bytearray(data)
    for place in at:
        flipped[place] ^= 1 << generator.randrange(8)
    first = at[0]
    return {
        "flipped": bytes(flipped),
        "cut": data[:first] + data[first + 57 :],
        "twice": data[: first + 91] + data[first:],
        "zeros": data[:first] + bytes(64) + data[first + 64 :],
        "junk": data[:first] + generator.randbytes(33) + data[first:],
        "digits": data[:first] + b"9" * 400 + data[first:],
        "nested": data[:first] + b"[" * 400 + data[first:],
        "ended": data[:first],
        "head": data[: generator.randrange(1, 12)],
    }


def main() -> None:
    """Write the seeds."""
    (HERE / "corpus").mkdir(exist_ok=True)
    for name, pattern in LOGS.items():
        data = next(HERE.glob(pattern)).read_bytes()[:SIZE]
        for kind, damaged in damages(data, random.Random(name)).items():
            (HERE / "corpus" / f"{kind}-{name}").write_bytes(damaged)


if __name__ == "__main__":
    main()
