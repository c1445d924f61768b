"""What a script reads and sets on a model: rates, device, generation parameters, progress. audiocraft's names.

Nothing here generates; `genmodel.py` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .codec import EnCodec, InterleaveStereo
from .config import GenerationParams
from .lm import LMModel

ProgressCallback = Callable[[int, int], None]


class Settings:
    """A language model over codec tokens, the codec that turns them into sound, and how to generate with them.

    Attributes (audiocraft's): `name`, `lm`, `compression_model`, `cfg`, `max_duration`, `duration`, `extend_stride`,
    `generation_params` (a dict), `device`; properties `frame_rate`, `sample_rate`, `audio_channels`. Durations and
    strides are seconds. `max_duration` None takes the checkpoint's; ValueError unless it is above 0.
    """

    def __init__(
        self, name: str, compression_model: EnCodec | InterleaveStereo, lm: LMModel, max_duration: float | None = None
    ):
        self.name = name
        self.compression_model = compression_model
        self.lm = lm
        self.cfg = lm.cfg
        self.max_duration = float(lm.config.max_duration if max_duration is None else max_duration)
        if not self.max_duration > 0:
            raise ValueError(f"max_duration must be above 0 seconds, got {self.max_duration}")
        self._progress_callback: ProgressCallback | None = None
        self._apply(self._defaults())

    # -- what a script reads and sets ---------------------------------------------------------------------------------

    def _defaults(self) -> GenerationParams:
        return GenerationParams(duration=15.0)

    @property
    def frame_rate(self) -> float:
        """Frames (columns of tokens) per second of audio."""
        return self.compression_model.frame_rate

    @property
    def sample_rate(self) -> int:
        """Samples a second (Hz) of the sound that is made."""
        return self.compression_model.sample_rate

    @property
    def audio_channels(self) -> int:
        """Channels of the sound that is made: 1, or 2 for stereo models."""
        return self.compression_model.channels

    @property
    def device(self) -> torch.device:
        """Where the weights are and where tokens and sound come out."""
        return self.lm.device

    @property
    def compat(self) -> str:
        """'isolated' (each request as if alone) or 'audiocraft' (its batch padding); see `conditioning`."""
        return self.lm.compat

    @compat.setter
    def compat(self, value: str) -> None:
        self.lm.compat = value

    def set_custom_progress_callback(self, progress_callback: ProgressCallback | None = None) -> None:
        """`progress_callback(steps done, steps in all)` takes the place of the bar of `progress=True`."""
        self._progress_callback = progress_callback

    def _apply(self, params: GenerationParams) -> None:
        stride = params.stride(self.max_duration)
        self.duration = params.duration
        self.extend_stride = stride
        self.generation_params: dict[str, Any] = {
            "use_sampling": params.use_sampling,
            "temp": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "cfg_coef": params.cfg_coef,
            "two_step_cfg": params.two_step_cfg,
            "cfg_coef_beta": params.cfg_coef_beta,
        }

    def params(self) -> GenerationParams:
        """The parameters of the next generation, read from the attributes that scripts set, and checked.

        TypeError, ValueError: an unknown name in `generation_params`, or what `GenerationParams` refuses.
        """
        given = dict(self.generation_params)
        known = {"use_sampling", "temp", "top_k", "top_p", "cfg_coef", "two_step_cfg", "cfg_coef_beta"}
        if set(given) - known:
            raise ValueError(f"unknown generation_params {sorted(set(given) - known)}: expected {sorted(known)}")
        temperature = given.pop("temp", 1.0)
        return GenerationParams(
            temperature=temperature, duration=self.duration, extend_stride=self.extend_stride, **given
        )

    @contextmanager
    def _progress(self, wanted: bool) -> Iterator[ProgressCallback | None]:
        if not wanted or self._progress_callback is not None:
            yield self._progress_callback if wanted else None
            return
        from tqdm import tqdm

        with tqdm(unit="step", dynamic_ncols=True) as bar:

            def report(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield report
