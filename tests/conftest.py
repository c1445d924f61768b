"""What every test shares: one thread (xdist's workers are the parallelism), no network, a GPU only where one is."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """A test that reaches for the network fails at once instead of hanging; loopback and unix sockets stay open."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and isinstance(address, tuple):
            if address[0] not in ("127.0.0.1", "::1", "localhost"):
                raise OSError(f"tests run without a network, but something connects to {address[0]}")
        connect(self, address)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of the CUDA decoder in torch that the number of rows does not round: what kernels promise, not BLAS."""
    from musicgen_fast.kernels import reference

    def product(a: torch.Tensor, weight: torch.Tensor, scales: None) -> torch.Tensor:
        assert scales is None
        return (a[:, None].float() * weight.float()).sum(-1).to(a.dtype)

    monkeypatch.setattr(reference, "_product", product)
