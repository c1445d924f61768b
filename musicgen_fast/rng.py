"""The state of torch's global generator of a device: what noise mode draws from. Knows nothing of who draws."""

from __future__ import annotations

import torch
from torch import Tensor


def rng_state(device: torch.device) -> Tensor:
    """The state of torch's global generator of a device."""
    if device.type == "cpu":
        return torch.get_rng_state()
    module = torch.get_device_module(device)
    return module.get_rng_state(device) if device.type == "cuda" else module.get_rng_state()


def set_rng_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    elif device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.get_device_module(device).set_rng_state(state)
