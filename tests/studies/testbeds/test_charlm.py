from __future__ import annotations

import pytest
import torch

from uncollapse.errors import DataError
from uncollapse.studies.testbeds.charlm import (
    ALPHABET,
    EOS,
    PAD,
    CharLM,
    CharLMLab,
    decode,
    encode,
    examine,
    logits_of,
    make_prompts,
    make_rows,
    pad_left,
    pad_right,
    sample,
    score,
    warm_up,
)


def fresh_model(seed: int = 0) -> CharLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CharLM().double()


def numbers(rows: int, limit: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, limit, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rows_have_the_stated_form() -> None:
    rows = make_rows(0, 400)
    lengths = {len(response) for _, response in rows}
    assert lengths == {9, 16, 23, 30}
    assert all(len(prompt) == 8 for prompt, _ in rows)
    assert make_rows(0, 400) == rows
    assert make_rows(1, 400) != rows
    right = score([p for p, _ in rows], pad_right([r for _, r in rows])).double().mean()
    assert 0.75 < right < 0.92


def test_rows_without_errors_are_all_right() -> None:
    rows = make_rows(3, 50, error_rate=0.0, checks=1)
    assert score([p for p, _ in rows], pad_right([r for _, r in rows])).all()
    for prompt, response in rows:
        digits = [int(c) for c in decode(prompt)[:-1].split("+")]
        block = "".join(f"{max(digits[: k + 2])};" for k in range(3))
        tail = f"!{max(digits)}$"
        assert decode(response) in (block + tail, f"{block}?{block}{tail}")


def test_difficulty_varies_the_number_of_digits() -> None:
    prompts = make_prompts(torch.Generator().manual_seed(0), 200, digits=(2, 7))
    assert {len(p) for p in prompts} == {4, 6, 8, 10, 12, 14}
    assert {len(r) for _, r in make_rows(0, 300, digits=(2, 2), checks=0)} == {5}


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("7;7;9;!9$", True),
        ("!9$", True),
        ("9;9;9;!7$", False),
        ("9;9;9;!9", False),
        ("9;9;9;!99$", False),
        ("9;9;9;9$", False),
        ("!", False),
        ("$", False),
        ("!7!9$", False),
    ],
)
def test_score(response: str, right: bool) -> None:
    prompts = [encode("7+3+9+1=")] * 2
    assert score(prompts, pad_right([encode(response), encode("9;" * 10)])).tolist() == [right, False]


def test_sampling_with_a_cache_gives_the_distribution_of_the_full_pass() -> None:
    model = fresh_model()
    prompts = [encode("7+3="), encode("7+3+9+1="), encode("1+2+3=")]
    ids, mask, logp = sample(model, prompts, numbers(3, 12), temperature=0.7)
    full = (
        (logits_of(model, prompts, ids) / 0.7)
        .log_softmax(-1)
        .gather(-1, ids.clamp(max=PAD - 1)[..., None])[..., 0]
    )
    torch.testing.assert_close(logp, torch.where(mask, full, 0.0), rtol=1e-9, atol=1e-9)
    assert (ids[~mask] == PAD).all()
    for row, real in zip(ids, mask, strict=True):
        ends = (row == EOS).nonzero()
        assert int(real.sum()) == (int(ends[0]) + 1 if len(ends) else len(row))


def test_padding_on_both_sides_changes_nothing() -> None:
    model = fresh_model(1)
    prompts, ids = [encode("7+3=")], pad_right([encode("7;!7$")])
    alone = logits_of(model, prompts, ids)
    more = [*prompts, encode("7+3+9+1+4+4=")]
    padded = logits_of(model, more, torch.cat([pad_right([encode("7;!7$") + (PAD,) * 4])] * 2))
    torch.testing.assert_close(padded[:1, :5], alone, rtol=1e-9, atol=1e-9)


def test_a_response_belongs_to_its_numbers() -> None:
    model, prompts = fresh_model(2), make_prompts(torch.Generator().manual_seed(0), 6)
    uniform, order = numbers(6, 8), torch.tensor([3, 0, 5, 1, 4, 2])
    ids, _, _ = sample(model, prompts, uniform)
    again, _, _ = sample(model, [prompts[i] for i in order], uniform[order])
    assert torch.equal(again, ids[order])


def test_logits_are_differentiable() -> None:
    model = fresh_model()
    logits_of(model, [encode("7+3=")], pad_right([encode("7;!7$")])).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_warm_up_is_repeatable_and_hands_out_copies() -> None:
    before = torch.random.get_rng_state()
    one, two = (warm_up(5, steps=3, batch=8) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one is not two
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert sum(p.numel() for p in one.parameters()) < 120_000


@pytest.mark.slow
def test_warmed_up_model_is_right_four_times_in_five() -> None:
    seen = examine(warm_up(0), seed=1)
    assert 0.7 < seen.accuracy < 0.9
    assert 16 < seen.length < 22
    assert 0.2 < seen.entropy < 0.35


def test_lab_scores_its_own_samples() -> None:
    lab, model = CharLMLab(token_limit=5), fresh_model().float()
    prompts = lab.fresh_prompts(4, seed=1)
    assert prompts == lab.fresh_prompts(4, seed=1)
    ids, mask = lab.sample(model, prompts, temperature=1.0, seed=2)
    assert ids.shape == mask.shape
    assert lab.reward(prompts, ids, mask).shape == (4,)
    assert lab.logits(model, prompts, ids).shape == (*ids.shape, len(ALPHABET) - 1)


def test_bad_input_is_named() -> None:
    with pytest.raises(DataError, match="'a'"):
        encode("a+1=")
    with pytest.raises(DataError, match="shorten the rows"):
        fresh_model()(torch.zeros(1, 200, dtype=torch.long))
    assert pad_left([(1,), (1, 2)]).tolist() == [[PAD, 1], [1, 2]]
