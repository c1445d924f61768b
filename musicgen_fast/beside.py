"""Work of a GPU that need not hold up other work: a second CUDA stream. On other devices nothing changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_streams = threading.local()


@contextmanager
def beside(device: torch.device, *inputs: Tensor) -> Iterator[None]:
    """What the block launches waits for what made `inputs`, and for nothing that comes later; the block's end for it.

    Meant for a thread of its own. The stream is the thread's: the next block's work queues behind this one's.
    """
    if device.type != "cuda":
        yield
        return
    made = torch.cuda.current_stream(device)
    streams = _streams.__dict__
    if str(device) not in streams:
        streams[str(device)] = torch.cuda.Stream(device)
    stream = streams[str(device)]
    stream.wait_stream(made)
    for tensor in inputs:
        tensor.record_stream(stream)  # its memory is not given to others before the block's work is done
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
