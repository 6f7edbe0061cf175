"""Features, classes, weights and everything together."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import LlamaConfig, LlamaForCausalLM

import uncollapse
from uncollapse.attention.entropy_guided_attention import (
    EntropyRegularizer,
    SoftmaxOnlyBlock,
    attach_entropy_regularizer,
)
from uncollapse.attention.sigma_reparam import apply_sigma_reparam
from uncollapse.errors import ConfigError, DataError
from uncollapse.inspection.attention import attention_statistics
from uncollapse.inspection.classes import head_inputs
from uncollapse.inspection.features import blocks_of, head_of
from uncollapse.inspection.weights import attention_logit_norms, weight_spectra
from uncollapse.measure.class_statistics import StreamingNC
from uncollapse.measure.neural_collapse import nc_metrics
from uncollapse.measure.spectra import effective_rank, singular_values


def with_spectral_norm(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            spectral_norm(module, "in_proj_weight")
        elif type(module) is nn.Linear:
            spectral_norm(module)


@pytest.fixture
def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, vocab_size=40, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens(seed: int = 0, rows: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_batches_with_padding_are_as_one_pass_over_what_is_no_padding(llama):
    ids, mask = tokens(), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    with uncollapse.watch(llama) as seen:
        llama(input_ids=ids[:2], attention_mask=mask[:2])
        llama(input_ids=ids[2:], attention_mask=mask[2:])
    found = seen.result()
    hidden = llama.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    kept = (mask[:, 1:] & mask[:, :-1]).bool()
    features, classes = hidden.last_hidden_state[:, :-1][kept], ids[:, 1:][kept]
    expected = StreamingNC(40, 24).update(features, classes).compute(W=llama.lm_head.weight)
    assert found.collapse.samples == expected.samples == int(kept.sum())
    for name, value in expected.values.items():
        assert found.collapse[name] == pytest.approx(value, rel=1e-4, nan_ok=True), name
    assert found.frames.metrics()["nc2_etf_means"] == pytest.approx(
        nc_metrics(features, classes, llama.lm_head.weight.detach()).nc2_etf_means, rel=1e-4
    )
    assert list(found.blocks) == ["model.layers.0", "model.layers.1", "model.layers.2"]
    second = hidden.hidden_states[2][mask.bool()].double()
    rank = float(effective_rank(singular_values(second - second.mean(0))))
    assert found.blocks["model.layers.1"].effective_rank == pytest.approx(rank, rel=1e-4)
    assert found.blocks["model.layers.1"].rows == int(mask.sum())
    assert len(found.heads) == 3
    assert not found.absent
    numbers = found.scalars(by_layer=True)
    assert numbers["features/effective_rank/model.layers.1"] == pytest.approx(rank, rel=1e-4)
    assert all(isinstance(value, float) for value in numbers.values())


@torch.no_grad()
def test_watching_again_goes_on_and_clear_begins_anew(llama):
    seen = uncollapse.watch(llama)
    for _ in range(2):
        with seen:
            llama(input_ids=tokens())
    assert seen.result().collapse.samples == 2 * 3 * 8
    seen.clear()
    assert seen.result().collapse is None
    assert "attention" in seen.result().absent
    with seen, pytest.raises(ConfigError, match="watched already"):
        seen.__enter__()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())


@torch.no_grad()
def test_a_classifier_without_attention():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    images, classes = torch.rand(30, 1, 8, 8), torch.arange(30) % 3
    with uncollapse.watch(model, classes=lambda: classes) as seen:
        model(images)
    found = seen.result(weights=True)
    features = model[:3](images)
    assert found.frames.nc1_quotient == pytest.approx(
        nc_metrics(features, classes, num_classes=10).nc1_quotient
    )
    assert found.frames.unseen == 7
    assert "MultiheadAttention" in found.absent["attention"]
    assert [one.name for one in found.weights] == ["0.weight", "3.weight"]
    assert found.weights[0].shape == (4, 9)
    assert found.weights[1].spectral_norm == pytest.approx(
        float(torch.linalg.matrix_norm(model[3].weight, 2)), rel=1e-5
    )
    with uncollapse.watch(model) as blind:
        model(images)
    assert "labels=" in blind.result().absent["classes"]


@torch.no_grad()
def test_two_passes_give_all_of_the_classical_metrics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5))
    images, classes = torch.rand(60, 1, 4, 4), torch.arange(60) % 4
    batches = [slice(0, 25), slice(25, 60)]
    now = batches[0]
    with uncollapse.watch(model, classes=lambda: classes[now]) as seen:
        for now in batches:
            model(images[now])
    assert seen.result().frames.nc4 is None
    with seen.deciding():
        for now in batches:
            model(images[now])
    found = seen.result()
    expected = nc_metrics(model[:3](images), classes, model[3].weight, model[3].bias, num_classes=5).metrics()
    assert found.frames.metrics() == pytest.approx(expected, rel=1e-5)
    assert found.collapse["nc1/pinv"] == pytest.approx(expected["nc1_pinv"], rel=1e-5)
    assert found.decisions.samples == 60
    scalars = seen.scalars()
    assert scalars["nc4/head_accuracy"] == float((model(images).argmax(1) == classes).double().mean())
    seen.clear()
    with seen.deciding():
        model(images)
    assert "first pass" in seen.result().absent["nc4"]


@torch.no_grad()
def test_rows_that_are_not_finite_are_left_out_and_counted(llama):
    ids = tokens()
    with uncollapse.watch(llama) as clean:
        llama(input_ids=ids[:2])

    def poison(module, args, output):
        if len(output) == 3:
            output = output.clone()
            output[2, 3] = torch.inf
        return output

    handle = llama.model.embed_tokens.register_forward_hook(poison)
    with uncollapse.watch(llama) as seen:
        llama(input_ids=ids)
    handle.remove()
    expected, found = clean.scalars(by_layer=True), seen.scalars(by_layer=True)
    # the first layer's rows before the broken token see nothing of it; behind it a weight of 0 does not stop NaN
    assert found["attention/nonfinite/rows"] == 4 * (6 + 9 + 9)
    assert found["features/nonfinite/rows"] == 3 * 9
    assert found["nc/nonfinite/rows"] == 8
    for layer in (1, 2):
        name = f"attention/normalized/model.layers.{layer}.self_attn"
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
    assert "left out" in seen.result().absent["nonfinite attention"]


@torch.no_grad()
def test_a_model_full_of_nan_gives_no_numbers_and_the_reasons(llama):
    for parameter in llama.parameters():
        parameter.fill_(torch.nan)
    with uncollapse.watch(llama) as seen:
        llama(input_ids=tokens())
    found = seen.result(weights=True)
    assert all("NaN" in found.absent[part] for part in ("attention", "features", "classes", "weights"))
    assert found.scalars()["features/nonfinite/rows"] == 3 * 9 * 3
    seen.clear()
    assert not any(seen.result().nonfinite.values())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("attention", [True, False])
def test_torch_s_encoder_on_its_way_of_nested_tensors(attention):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2).eval()
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = padding[:, 4:] = True
    plain = encoder(x, src_key_padding_mask=padding)
    with uncollapse.watch(encoder, attention=attention) as seen:
        same = encoder(x, src_key_padding_mask=padding)
        encoder(x)
    torch.testing.assert_close(same, plain)
    assert not same[padding].any()
    encoder.use_nested_tensor = False
    with uncollapse.watch(encoder, attention=attention) as expected:
        encoder(x, src_key_padding_mask=padding)
        encoder(x)
    found = seen.scalars(by_layer=True)
    assert found == pytest.approx(expected.scalars(by_layer=True), rel=1e-6)
    assert [block.rows for block in seen.result().blocks.values()] == [11 + 15] * 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())


@torch.no_grad()
def test_padding_of_torch_s_layers_with_time_first_is_left_out():
    layer = nn.TransformerEncoderLayer(16, 2, 24)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, padding = torch.randn(5, 5, 16), torch.zeros(5, 5, dtype=torch.bool)
    padding[1, 3:] = True
    x[3:, 1] = 1e4
    with uncollapse.watch(encoder) as seen:
        encoder(x, src_key_padding_mask=padding)
        hidden = encoder.layers[0](x, src_key_padding_mask=padding).transpose(0, 1)[~padding].double()
    assert seen.result().blocks["layers.0"].effective_rank == pytest.approx(
        float(effective_rank(singular_values(hidden - hidden.mean(0)))), rel=1e-4
    )


@torch.no_grad()
def test_an_attention_that_is_not_understood_is_told_and_the_model_runs():
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True), torch.randn(2, 3, 8)
    plain, _ = attention(x, x, x)
    with uncollapse.watch(attention) as seen:
        same, _ = attention(x, x, x)
    assert torch.equal(same, plain)
    assert "add_bias_kv" in seen.result().absent["attention"]
    with pytest.raises(ConfigError, match="add_bias_kv"), attention_statistics(attention):
        attention(x, x, x)


@torch.no_grad()
def test_blocks_of_changing_width_and_float64_beyond_its_squares():
    model = nn.Sequential(nn.Identity(), nn.Identity()).double()
    with uncollapse.watch(model, attention=False) as seen:
        model(torch.randn(4, 3, dtype=torch.double))
        model(torch.randn(4, 5, dtype=torch.double))
        model(torch.full((4, 3), 1e200, dtype=torch.double))
    found = seen.result()
    assert found.blocks["0"].rows == 4
    assert "another width" in found.absent["features"]
    assert found.nonfinite["features"] == 8


def test_labels_of_a_call_and_ignored_ones():
    head, kept = nn.Linear(4, 3), []
    model = nn.Sequential(head)
    given = torch.tensor([0, -100, 2, 1])
    with head_inputs(model, lambda h, y: kept.append((h, y)), classes=lambda: given):
        model(torch.randn(4, 4))
    assert kept[0][1].tolist() == [0, 2, 1]
    assert kept[0][0].shape == (3, 4)


def test_where_the_head_and_the_blocks_are(llama):
    assert head_of(llama) is llama.lm_head
    assert head_of(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))).out_features == 4
    with pytest.raises(ConfigError, match="get_output_embeddings"):
        head_of(nn.ReLU())
    assert list(blocks_of(llama)) == [f"model.layers.{i}" for i in range(3)]
    assert blocks_of(nn.Linear(2, 2)) == {}


@torch.no_grad()
def test_the_norm_of_the_logit_map(llama):
    found = attention_logit_norms(llama)
    attention = llama.model.layers[1].self_attn
    q = attention.q_proj.weight.reshape(4, 6, 24).double()
    k = attention.k_proj.weight.reshape(2, 6, 24).double().repeat_interleave(2, 0)
    expected = torch.linalg.matrix_norm(q.mT @ k, 2) / math.sqrt(6)
    torch.testing.assert_close(found["model.layers.1.self_attn"], expected)
    heads = nn.MultiheadAttention(8, 2)
    w_q, w_k, _ = heads.in_proj_weight.reshape(3, 2, 4, 8).double()
    torch.testing.assert_close(
        attention_logit_norms(heads)[""], torch.linalg.matrix_norm(w_q.mT @ w_k, 2) / 2
    )


def test_spectra_of_long_and_of_broken_weights(llama):
    tall = nn.Embedding(200, 6)
    (one,) = weight_spectra(tall)
    assert one.effective_rank == pytest.approx(
        float(effective_rank(singular_values(tall.weight.detach()))), rel=1e-5
    )
    tied = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    tied[1].weight = tied[0].weight
    assert len(weight_spectra(tied)) == 1
    with torch.no_grad():
        llama.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(DataError, match=r"lm_head\.weight"):
        weight_spectra(llama)
    with torch.no_grad(), uncollapse.watch(llama) as seen:
        llama(input_ids=tokens())
    assert "nc3/cosine/mean" not in seen.scalars()


@pytest.mark.parametrize("put_on", [apply_sigma_reparam, with_spectral_norm])
def test_reading_a_parametrised_model_changes_nothing(llama, put_on):
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    for model, given in ((encoder, torch.randn(2, 5, 8)), (llama.train(), tokens())):
        put_on(model)
        other = copy.deepcopy(model)
        other(given)
        with uncollapse.watch(model) as seen:
            model(given)
            seen.result(weights=True)
        assert model.state_dict().keys() == other.state_dict().keys()
        for name, value in other.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
        assert all(module.training for module in model.modules())


def test_spectra_are_of_the_weights_computed_with():
    torch.manual_seed(0)
    layers = nn.ModuleDict(
        {"attn": nn.MultiheadAttention(8, 2), "conv": nn.Conv2d(4, 6, 3), "map": nn.Linear(5, 7)}
    )
    names = [one.name for one in weight_spectra(layers)]
    assert names == ["attn.in_proj_weight", "attn.out_proj.weight", "conv.weight", "map.weight"]
    apply_sigma_reparam(layers, gamma_init=3.0)
    found = {one.name: one for one in weight_spectra(layers)}
    assert sorted(found) == sorted(names)
    assert all(one.spectral_norm == pytest.approx(3, rel=1e-5) for one in found.values())
    assert found["conv.weight"].shape == (6, 36)
    shared = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    for layer in shared:
        layer.weight = shared[0].weight
    spectral_norm(shared[0])
    assert [one.name for one in weight_spectra(shared)] == ["0.weight"]


def test_spectra_leave_out_what_maps_nothing(llama):
    names = [one.name for one in weight_spectra(llama)]
    attach_entropy_regularizer(llama, EntropyRegularizer())
    assert [one.name for one in weight_spectra(llama)] == names
    block = SoftmaxOnlyBlock(width=8, heads=2, context=6)
    assert [one.name for one in weight_spectra(block)] == [
        "attention.qkv.weight", "attention.out.weight", "feed_forward.linear.weight",
    ]  # fmt: skip


def test_the_norm_of_the_logit_map_is_of_the_weights_computed_with():
    torch.manual_seed(0)
    heads = nn.MultiheadAttention(8, 2, bias=False)
    plain = attention_logit_norms(heads)[""]
    apply_sigma_reparam(heads, blocks={"": 3}, gamma_init=1.0)
    norms = torch.linalg.matrix_norm(
        heads.parametrizations.in_proj_weight.original.detach().reshape(3, 8, 8), 2
    )
    torch.testing.assert_close(attention_logit_norms(heads)[""], plain / (norms[0] * norms[1]).double())
