"""What an accelerated object carries: our language model around its weights, and the names that were put on it.

Knows neither library. The handle refers to the live object weakly, so that `del model` frees its memory at once.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..conditioning import Conditioner
from ..config import GenerationParams
from ..lm import LMModel
from ..sampling import SamplingParams
from ..state import Sampler, State
from .weights import Weights, fingerprint

HANDLE = "musicgen_fast"  # the attribute of an accelerated object

ParamsOf = Callable[[int], SamplingParams]  # of a batch
OnColumn = Callable[[Tensor], None]


class Unsupported(Exception):
    """What this project does not compute: the model's own code runs instead. Without names: nothing worth a word."""

    def __init__(self, *names: str):
        super().__init__(*names)
        self.names = names


def warn_unsupported(names: Iterable[str]) -> None:
    """One warning that names what the fast path lacks; none without names."""
    listed = ", ".join(dict.fromkeys(names))
    if listed:
        warnings.warn(f"musicgen_fast does not accelerate {listed}: the model's own generate runs", stacklevel=3)


class LiveLM(LMModel):
    """An `LMModel` for which a run may bring the parameters of its sampler, and look at every column."""

    params_of: ParamsOf | None = None

    def sampler(self, params: GenerationParams, batch: int, seeds: list[int] | None) -> Sampler:
        return super().sampler(params, batch, seeds) if self.params_of is None else Sampler(self.params_of(batch))

    def for_run(self, params_of: ParamsOf, on_column: OnColumn | None = None) -> LiveLM:
        """The same model for one run; threads do not share what is set here.

        `on_column` is given each column int64 [B, K] after it was drawn, the special token where there is no frame.
        """
        lm = copy.copy(self)
        lm.params_of = params_of
        if on_column is not None:
            lm.decoder = _Tap(self.decoder, on_column)  # type: ignore[assignment]
        return lm


class _Tap:
    """A decoder that shows the columns of a single window as they are written."""

    def __init__(self, decoder: Any, on_column: OnColumn):
        self._decoder, self._on_column = decoder, on_column

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def prefill(self, state: State, *args: Any, **options: Any) -> None:
        self._decoder.prefill(state, *args, **options)
        self._on_column(state.sequence[:, :, state.column - 1])

    def step(self, *states: State) -> None:
        self._decoder.step(*states)
        for state in states:
            self._on_column(state.sequence[:, :, state.column - 1])


class LiveModel(ABC):
    """Base of the two kinds of accelerated objects; `model.musicgen_fast` is one.

    Attributes:
        shared_bytes, extra_bytes: of the weights: used where the live object keeps them, and copied beside it.
        lm: the `LMModel` around them; call `current()` where the weights may have changed.
    """

    def __init__(self, model: Any):
        self._target = weakref.ref(self.target_of(model))
        self._seen: tuple[Any, ...] = ()
        self._lm: LiveLM | None = None
        self.shared_bytes = self.extra_bytes = 0

    @staticmethod
    def target_of(model: Any) -> Any:
        """The part of an object whose methods we stand in for."""
        return model

    def belongs_to(self, model: Any) -> bool:
        """Whether it was made for this object as it is: not for the one it was copied from, nor its former parts."""
        return self._target() is self.target_of(model)

    @property
    def target(self) -> Any:
        """The object whose methods we stand in for; ReferenceError where it is gone."""
        target = self._target()
        if target is None:
            raise ReferenceError("the accelerated model no longer exists")
        return target

    # -- what the two kinds say ---------------------------------------------------------------------------------------

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """The live parameters of the language model, by their names in the live object."""

    @abstractmethod
    def convert(self) -> Weights:
        """Our transformer around the live weights. ValueError for a model that we do not compute."""

    @abstractmethod
    def install(self, model: Any) -> None:
        """Puts our methods in the place of the object's."""

    @abstractmethod
    def remove(self, model: Any) -> None:
        """Takes them off again."""

    # -- weights ------------------------------------------------------------------------------------------------------

    @property
    def lm(self) -> LiveLM:
        """The `LMModel` around the live weights as they are now."""
        return self.current()

    def current(self) -> LiveLM:
        """Our language model, read again if the weights were changed, moved or replaced since."""
        if self._lm is None or self._seen != fingerprint(self.parameters().values()):
            self.refresh()
        assert self._lm is not None
        return self._lm

    def refresh(self) -> None:
        """Reads the live weights."""
        self._lm = None  # the old copies go before the new ones come
        seen = fingerprint(self.parameters().values())
        weights = self.convert()
        transformer = weights.transformer
        self._lm = LiveLM(transformer, Conditioner(transformer.config, transformer))
        self._seen, self.shared_bytes, self.extra_bytes = seen, weights.shared_bytes, weights.extra_bytes

    # -- copies of the object -----------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveModel:
        """The copy of an accelerated model is accelerated, around its own weights, from its first call on."""
        target = memo.get(id(self._target()))
        if target is None:
            raise TypeError("a LiveModel cannot be copied without its model")
        return type(self)(target)

    def __reduce__(self) -> Any:
        raise TypeError("an accelerated model cannot be pickled: call musicgen_fast.unaccelerate(model) before")


@contextmanager
def own_precision(device: torch.device) -> Iterator[None]:
    """Without autocast: our transformer converts where it must."""
    with torch.autocast(device.type, enabled=False):
        yield
