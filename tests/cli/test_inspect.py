"""`uncollapse inspect` on small models and odd input."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertTokenizerFast

from uncollapse.cli import main
from uncollapse.models import load


def test_the_packaged_model_with_a_page(tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["inspect", "tiny", "--tokens", "128", "--length", "32", "--html", str(page)]) == 0
    out = capsys.readouterr()
    assert "head" in out.out
    assert "model.layers.1.self_attn" in out.out
    assert "page:" in out.err
    html = page.read_text()
    assert "The sharpest heads" in html
    assert "Classes at the head" in html
    assert "embed_tokens" in html


def test_json_has_every_head_every_layer_and_every_weight(capsys):
    assert main(["inspect", "tiny", "--tokens", "64", "--length", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model, _ = load("tiny")
    layer = "model.layers.0.self_attn"
    heads = model.config.num_attention_heads
    assert len(found["heads"]) == len(found["logit_norms"]) == model.config.num_hidden_layers
    assert all(len(found["heads"][layer][name]) == heads for name in ("entropy", "normalized", "first"))
    mean = sum(found["heads"][layer]["normalized"]) / heads
    assert found["scalars"][f"attention/normalized/{layer}"] == pytest.approx(mean)
    assert found["scalars"][f"attention/logit_norm/{layer}"] == max(found["logit_norms"][layer])
    table = {one["name"]: one for one in found["weights"]}
    assert table["model.embed_tokens.weight"]["shape"] == list(model.get_input_embeddings().weight.shape)
    assert {"spectral_norm", "effective_rank", "stable_rank"} <= set(table["model.embed_tokens.weight"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_json_of_a_text_file_is_the_same_with_any_kernel(tmp_path, capsys, attention):
    text = tmp_path / "text.txt"
    text.write_text("the sum of 1 2 3 is 6. " * 40)
    command = [
        "inspect",
        "tiny",
        "--data",
        str(text),
        "--tokens",
        "96",
        "--length",
        "32",
        "--no-weights",
        "--json",
    ]
    assert main([*command, "--attention", attention]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data"] == "text.txt"
    assert 0 < found["scalars"]["attention/normalized/mean"] < 1
    assert "weights/spectral_norm/max" not in found["scalars"]
    if attention == "sdpa":
        assert main(command) == 0
        assert json.loads(capsys.readouterr().out)["scalars"] == pytest.approx(
            found["scalars"], rel=1e-4, nan_ok=True
        )


def test_a_masked_language_model_keeps_its_head_and_takes_no_next_tokens(tmp_path, capsys):
    _, tokenizer = load("tiny")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--tokens", "64", "--length", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "nc/classes" not in found["scalars"]
    assert "BertForMaskedLM" in found["absent"]["classes"]
    assert 0 < found["scalars"]["attention/normalized/mean"] <= 1


@pytest.fixture
def classifier(tmp_path):
    directory = tmp_path / "classifier"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=2
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(directory)
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(directory)
    return directory


def test_a_text_classifier_with_labels(tmp_path, capsys, classifier):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"text": text, "label": i % 2}) + "\n"
            for i, text in enumerate(["good film", "bad"] * 6)
        )
    )
    assert main(["inspect", str(classifier), "--data", str(rows), "--length", "8", "--json"]) == 0
    scalars = json.loads(capsys.readouterr().out)["scalars"]
    assert scalars["nc/classes"] == 2
    assert scalars["nc/nc2_equiangular_means"] == pytest.approx(
        0, abs=1e-6
    )  # two classes always face each other
    assert scalars["nc1/pinv"] == pytest.approx(scalars["nc/nc1_pinv"])
    assert scalars["nc/nc4"] == 1 - scalars["nc4/seen_head"]
    assert scalars["nc4/centre_accuracy"] == 1  # each class is one text, and so its own mean
    page = tmp_path / "page.html"
    assert main(["inspect", str(classifier), "--data", str(rows), "--length", "8", "--html", str(page)]) == 0
    assert "nc4/full_head" in page.read_text()
    capsys.readouterr()
    assert main(["inspect", str(classifier)]) == 2
    assert "labelled" in capsys.readouterr().err
    rows.write_text(json.dumps({"text": "good", "label": "yes"}) + "\n")
    assert main(["inspect", str(classifier), "--data", str(rows)]) == 2
    assert (
        "'yes' is no class; give numbers from 0, or names of the model: LABEL_0, LABEL_1"
        in capsys.readouterr().err
    )


def test_a_classifier_reads_from_all_of_a_sorted_file_and_knows_the_names_of_classes(
    tmp_path, capsys, classifier
):
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "good film,LABEL_1\n" * 60 + ",LABEL_1\n" + "bad film,LABEL_0\n" * 60)
    command = ["inspect", str(classifier), "--data", str(rows), "--length", "8", "--json"]
    assert main([*command, "--texts", "20"]) == 0
    assert json.loads(capsys.readouterr().out)["scalars"]["nc/classes"] == 2
    assert main([*command, "--texts", "0"]) == 2
    assert "--texts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tokens", "4", "--length", "8"], "tokens >= length"),
        (["--data", "{}/no-such.csv"], "no-such.csv does not exist"),
        (["--data", "no-such.jsonl"], "no-such.jsonl does not exist"),
        (["--data", "{}/short.txt"], "2 tokens"),
        (["--data", "{}/rows.csv", "--column", "words"], "no column words"),
        (["--attention", "no_such_kernel"], "--attention no_such_kernel"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, capsys, options, said):
    (tmp_path / "short.txt").write_text("ab")
    (tmp_path / "rows.csv").write_text("text,other\nabc,1\n")
    assert main(["inspect", "tiny", *(option.format(tmp_path) for option in options)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
