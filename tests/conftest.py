"""Settings that every test shares: one thread, the same examples every time, no display and no network."""

import importlib.util
import ipaddress
import os
import shutil
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# Before the libraries that read them are imported.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
)

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# `HYPOTHESIS_PROFILE=explore pytest ...` looks for new examples; a failure prints how to replay it.
settings.register_profile("ci", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip browser tests, with the reason, on a machine that has no Chromium."""
    if CHROMIUM:
        return
    skip = pytest.mark.skip(reason="no chromium on this machine")
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker(skip)


class NetworkUsed(AssertionError):
    """A test reached for the network."""


def _is_local(host: object) -> bool:
    if host in (None, "", b"", "localhost", b"localhost", socket.gethostname()):
        return True
    text = host.decode() if isinstance(host, bytes) else str(host)
    try:
        return ipaddress.ip_address(text.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _refuse(host: object) -> None:
    if not _is_local(host):
        raise NetworkUsed(f"a test reached for the network: {host!r}; tests use local data only")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sockets reach this machine only."""
    resolve, connect, connect_ex = socket.getaddrinfo, socket.socket.connect, socket.socket.connect_ex

    def local_getaddrinfo(host: Any, *args: Any, **options: Any) -> Any:
        _refuse(host)
        return resolve(host, *args, **options)

    def local_connect(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple):
            _refuse(address[0])
        connect(self, address)

    def local_connect_ex(self: socket.socket, address: Any) -> int:
        if isinstance(address, tuple):
            _refuse(address[0])
        return connect_ex(self, address)

    monkeypatch.setattr(socket, "getaddrinfo", local_getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", local_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", local_connect_ex)


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """The maker of synthetic runs that the tests of reports share."""
    spec = importlib.util.spec_from_file_location(
        "uncollapse_synthetic_runs", Path(__file__).with_name("report") / "synthetic.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
