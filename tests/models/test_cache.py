from pathlib import Path

import pytest

from uncollapse.errors import DataError
from uncollapse.models.cache import cache_directory, cached


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNCOLLAPSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("UNCOLLAPSE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == Path.home() / ".cache" / "uncollapse"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "uncollapse"
    monkeypatch.setenv("UNCOLLAPSE_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"


def test_made_once(cache):
    calls = []

    def make(target):
        calls.append(target)
        (target / "file").write_text("content")

    first = cached("key", make)
    assert first == cached("key", make) == cache / "key"
    assert len(calls) == 1
    assert (first / "file").read_text() == "content"
    assert list(cache.iterdir()) == [first]


def test_what_breaks_halfway_leaves_nothing(cache):
    def make(target):
        (target / "file").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("key", make)
    assert list(cache.iterdir()) == []


def test_of_two_that_make_it_the_first_wins(cache):
    def make(target):
        (target / "file").write_text("second")
        cached("key", lambda other: (other / "file").write_text("first") and None)

    assert (cached("key", make) / "file").read_text() == "first"
    assert [p.name for p in cache.iterdir()] == ["key"]


def test_a_full_disk_and_a_place_that_cannot_be_written(cache, monkeypatch):
    def full(target):
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="No space left on device; free space there or set UNCOLLAPSE_CACHE"):
        cached("key", full)
    (cache / "file").write_text("")
    monkeypatch.setenv("UNCOLLAPSE_CACHE", str(cache / "file"))
    with pytest.raises(DataError, match="cannot write the cache"):
        cached("key", full)
