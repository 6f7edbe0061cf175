"""Scalars of a watched model in the log of a trainer."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from uncollapse.errors import ConfigError
from uncollapse.integrations.watch_callback import WatchCallback


class Logger(TrainerCallback):
    """Stands where TensorBoard does."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append(dict(logs))


def trainer(tmp_path, logger: Logger) -> Trainer:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=20
    )
    rows = [
        {"input_ids": torch.randint(0, 20, (8,)), "labels": torch.randint(0, 20, (8,))} for _ in range(16)
    ]
    args = TrainingArguments(
        str(tmp_path), max_steps=5, per_device_train_batch_size=4, logging_steps=100, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    return Trainer(LlamaForCausalLM(config), args, train_dataset=rows, callbacks=[logger])


def test_every_second_step_is_logged_before_the_loggers_read(tmp_path):
    logger = Logger()
    built = trainer(tmp_path, logger)
    callback = WatchCallback(every=2, by_layer=True, weights=True).attach(built)
    built.train()
    names = ("attention/normalized/mean", "features/effective_rank/last", "nc1/cdnv/mean")
    seen = [row for row in logger.rows if names[0] in row]
    assert len(seen) == 3
    assert all(0 < row["attention/normalized/mean"] <= 1 for row in seen)
    assert all(name in row for row in seen for name in names)
    assert any(name.startswith("attention/normalized/model.layers.1") for name in seen[0])
    layers = [row["attention/logit_norm/model.layers.0.self_attn"] for row in seen]
    assert len(set(layers)) == 3  # it moves as the model learns
    assert max(seen[0][f"attention/logit_norm/model.layers.{i}.self_attn"] for i in (0, 1)) == pytest.approx(
        seen[0]["attention/logit_norm/max"]
    )
    assert 0 < seen[0]["weights/effective_rank/share"] <= 1
    assert seen[0]["weights/spectral_norm/max"] == max(
        value for name, value in seen[0].items() if name.startswith("weights/spectral_norm/")
    )
    assert "weights/effective_rank/lm_head.weight" in seen[0]
    assert next(row for row in built.state.log_history if names[0] in row)[names[1]] == seen[0][names[1]]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in built.model.modules())
    assert callback.every == 2


def test_hooks_go_when_training_breaks_off(tmp_path):
    built = trainer(tmp_path, Logger())
    callback = WatchCallback(every=1).attach(built)
    callback.on_step_begin(built.args, built.state, built.control, model=built.model)
    callback.on_train_end(built.args, built.state, built.control)
    assert not any(module._forward_pre_hooks for module in built.model.modules())
    with pytest.raises(ConfigError, match="every"):
        WatchCallback(every=0)


class Poison(TrainerCallback):
    """Puts NaN into one weight after the first step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan


def test_a_run_that_meets_nan_is_watched_to_its_end_and_not_changed(tmp_path):
    kernel = torch.nn.functional.scaled_dot_product_attention
    weights = []
    for watched in (False, True):
        logger = Logger()
        built = trainer(tmp_path, logger)
        built.add_callback(Poison())
        if watched:
            WatchCallback(every=1).attach(built)
        torch.manual_seed(1)
        built.train()
        weights.append(built.model.state_dict())
    plain, same = weights
    assert all(torch.equal(plain[name].nan_to_num(), same[name].nan_to_num()) for name in plain)
    seen = [row for row in logger.rows if "features/nonfinite/rows" in row]
    assert len(seen) == 5
    assert seen[0]["features/nonfinite/rows"] == seen[0]["attention/nonfinite/rows"] == 0
    assert seen[1]["features/nonfinite/rows"] == 4 * 8 * 2
    assert seen[1]["nc/nonfinite/rows"] == 4 * 7
    assert (
        seen[1]["attention/nonfinite/rows"] == 4 * 2 * 8
    )  # the second layer reads what the first has broken
    assert "attention/normalized/mean" in seen[1]
    assert torch.nn.functional.scaled_dot_product_attention is kernel
    assert not any(module._forward_pre_hooks for module in built.model.modules())


def test_hooks_go_when_a_step_raises(tmp_path):
    kernel = torch.nn.functional.scaled_dot_product_attention

    def interrupted(module, args, output):
        raise KeyboardInterrupt

    built = trainer(tmp_path, Logger())
    handle = built.model.model.layers[1].mlp.register_forward_hook(interrupted)
    WatchCallback(every=1).attach(built)
    with pytest.raises(KeyboardInterrupt):
        built.train()
    handle.remove()
    assert torch.nn.functional.scaled_dot_product_attention is kernel
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in built.model.modules())
