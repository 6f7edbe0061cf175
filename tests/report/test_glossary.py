from __future__ import annotations

from uncollapse.report.glossary import CONCEPTS, TERMS, explain, title_and_unit


def test_only_what_is_shown_is_explained() -> None:
    assert [term.key for term in explain(["eval/pass@8", "lr", "other/thing"])] == ["eval/pass@*", "lr"] + [
        ""
    ] * len(CONCEPTS)


def test_titles_fit_a_small_panel() -> None:
    assert title_and_unit("kl/old/k3") == ("Distance of a step", "nats")
    assert title_and_unit("loss/policy") == ("loss/policy", "")
    assert title_and_unit("mine/own") == ("mine/own", "")
    assert (
        max(len(term.name) for term in TERMS if not term.key.startswith(("entropy/", "covariance/", "eval/")))
        < 24
    )


def test_keys_are_unique() -> None:
    assert len({term.key for term in TERMS}) == len(TERMS)
