"""A CUDA graph without a GPU: notes the launches of a step with the memory that they got, and makes them again.

As in a real capture nothing runs while it is noted, numbers that Python computed then are frozen, and every replay
reads and writes the same memory. Whatever a step does beside its launches is an error here, as it would be lost there.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_VIEWS = {"view", "slice", "select", "unflatten", "reshape", "_unsafe_view", "alias", "detach", "transpose", "permute"}


class _OnlyViews(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name in _VIEWS, f"a captured step calls {name} beside its kernels: a replay would not"
        return func(*args, **(kwargs or {}))


class FakeCapture:
    """`ops`: functions that are noted during a capture, and otherwise called. `captured`, `replayed`: how often."""

    def __init__(self, functions: Any):
        self.captured = self.replayed = 0
        self._noted: list[tuple[Any, Any, Any]] | None = None
        self.ops = SimpleNamespace(**{name: self._noting(f) for name, f in vars(functions).items() if callable(f)})

    def __call__(self, body: Any) -> Any:
        noted = self._noted = []
        with _OnlyViews():
            body()
        self._noted = None
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            for function, args, kwargs in noted:
                function(*args, **kwargs)

        return replay

    def _noting(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            if self._noted is None:
                function(*args, **kwargs)
            else:
                self._noted.append((function, args, kwargs))

        return call
