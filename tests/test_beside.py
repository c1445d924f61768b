"""Work on a second stream: nothing changes without a GPU; with one the result is the same and there at the end."""

from __future__ import annotations

import pytest
import torch

from musicgen_fast.beside import beside


def doubled(device: torch.device) -> torch.Tensor:
    x = torch.arange(1 << 20, device=device, dtype=torch.float32)
    with beside(device, x):
        y = x.clone()
        for _ in range(10):
            y = y + x
    return y


def test_elsewhere_it_is_nothing() -> None:
    assert torch.equal(doubled(torch.device("cpu")), 11 * torch.arange(1 << 20, dtype=torch.float32))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    device = torch.device("cuda")
    streams = []
    for _ in range(3):
        assert torch.equal(doubled(device).cpu(), 11 * torch.arange(1 << 20, dtype=torch.float32))
        with beside(device):
            streams.append(torch.cuda.current_stream(device))
    assert len({s.cuda_stream for s in streams}) == 1 and streams[0] != torch.cuda.current_stream(device)
