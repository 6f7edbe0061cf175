"""The curated names: all load, and the package itself needs no torch."""

import pkgutil
import subprocess
import sys

import pytest

import uncollapse.measure as measure


def test_every_public_name_loads():
    for name in measure.__all__:
        value = getattr(measure, name)
        assert callable(value), name
        assert (value.__doc__ or "").strip(), name


def test_no_name_hides_a_module():
    assert not set(measure.__all__) & {module.name for module in pkgutil.iter_modules(measure.__path__)}


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'entropie'"):
        measure.entropie  # noqa: B018


def test_import_needs_no_torch():
    code = "import sys, uncollapse.measure; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
