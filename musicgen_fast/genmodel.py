"""What MusicGen and AudioGen share: generation parameters, windows, prompts, progress, tokens to audio.

The public methods have audiocraft's names, arguments and defaults (`BaseGenModel`), with `seed=` added. Encoding of the
conditions and the drawing of tokens happen in `lm.py`; audio files in `audio.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .audio import convert_audio
from .codec import EnCodec, InterleaveStereo
from .conditioning import ConditioningAttributes
from .config import GenerationParams
from .lm import LMModel, request_seeds
from .state import Conditions
from .windows import Window, plan_windows

Seed = int | Sequence[int] | None
ProgressCallback = Callable[[int, int], None]


class GenerationModel:
    """A language model over codec tokens and the codec that turns them into sound.

    Attributes (audiocraft's): `name`, `lm`, `compression_model`, `cfg`, `max_duration`, `duration`, `extend_stride`,
    `generation_params` (a dict), `device`; properties `frame_rate`, `sample_rate`, `audio_channels`.
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
        return self.compression_model.sample_rate

    @property
    def audio_channels(self) -> int:
        return self.compression_model.channels

    @property
    def device(self) -> torch.device:
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
        """The parameters of the next generation, read from the attributes that scripts set, and checked."""
        given = dict(self.generation_params)
        known = {"use_sampling", "temp", "top_k", "top_p", "cfg_coef", "two_step_cfg", "cfg_coef_beta"}
        if set(given) - known:
            raise ValueError(f"unknown generation_params {sorted(set(given) - known)}: expected {sorted(known)}")
        temperature = given.pop("temp", 1.0)
        return GenerationParams(
            temperature=temperature, duration=self.duration, extend_stride=self.extend_stride, **given
        )

    # -- ways of generating -------------------------------------------------------------------------------------------

    def generate(
        self,
        descriptions: Sequence[str | None],
        progress: bool = False,
        return_tokens: bool = False,
        *,
        seed: Seed = None,
    ) -> Any:
        """Music for each description.

        Args:
            descriptions: B texts; None or "" is a request without a text.
            progress: show a bar on stderr, or call the custom callback.
            return_tokens: return the tokens as well.
            seed: None draws from torch's global generator (audiocraft's tokens for the same `torch.manual_seed`). An
                int s gives request b the seed s + b, a list one to each: then a request's tokens depend on the
                weights, its parameters and its seed alone.

        Returns:
            wav [B, channels, samples] float32 on the model's device (not clipped), or (wav, tokens int64 [B, K, T]).

        Raises:
            TypeError, ValueError: descriptions that are not a list of texts, parameters that cannot be used.
        """
        attributes, prompt = self._prepare_tokens_and_attributes(descriptions, None)
        return self._finish(self._generate_tokens(attributes, prompt, progress, seed), return_tokens)

    def generate_unconditional(
        self, num_samples: int, progress: bool = False, return_tokens: bool = False, *, seed: Seed = None
    ) -> Any:
        """`num_samples` pieces without any condition; see `generate`."""
        if isinstance(num_samples, bool) or not isinstance(num_samples, int):
            raise TypeError(f"num_samples must be an int, got {type(num_samples).__name__}")
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        return self.generate([None] * num_samples, progress, return_tokens, seed=seed)

    def generate_continuation(
        self,
        prompt: Tensor,
        prompt_sample_rate: int,
        descriptions: Sequence[str | None] | None = None,
        progress: bool = False,
        return_tokens: bool = False,
        *,
        seed: Seed = None,
    ) -> Any:
        """Continue recordings. The duration includes them; they come back as the codec hears them.

        Args:
            prompt: [B, C, n] or [C, n] waveform, any rate and channels.
            prompt_sample_rate: its rate in Hz.
            descriptions: one per recording, or None.

        Raises:
            ValueError: NaN, no samples, a wrong shape, or a prompt that leaves nothing to generate.
        """
        prompt = checked_audio(prompt, "prompt", prompt_sample_rate)
        prompt = prompt[None] if prompt.dim() == 2 else prompt
        if prompt.dim() != 3:
            raise ValueError(f"prompt must be a waveform [B, C, n] or [C, n], got {list(prompt.shape)}")
        if prompt.shape[2] / prompt_sample_rate >= self.duration:
            raise ValueError(
                f"the prompt ({prompt.shape[2] / prompt_sample_rate:.2f} s) is as long as the audio to generate "
                f"({self.duration} s, prompt included): set a longer duration or cut the prompt"
            )
        descriptions = [None] * len(prompt) if descriptions is None else descriptions
        prompt = convert_audio(prompt.float(), prompt_sample_rate, self.sample_rate, self.audio_channels)
        attributes, tokens = self._prepare_tokens_and_attributes(descriptions, prompt)
        return self._finish(self._generate_tokens(attributes, tokens, progress, seed), return_tokens)

    @torch.no_grad()
    def generate_audio(self, gen_tokens: Tensor) -> Tensor:
        """Tokens [B, K, T] -> wav [B, channels, samples]."""
        return self.compression_model.decode(gen_tokens, None)

    # -- inside (the names that forks of audiocraft use) --------------------------------------------------------------

    @torch.no_grad()
    def _prepare_tokens_and_attributes(
        self, descriptions: Sequence[str | None], prompt: Tensor | None
    ) -> tuple[list[ConditioningAttributes], Tensor | None]:
        attributes = [ConditioningAttributes(text={"description": d}) for d in checked_texts(descriptions)]
        if prompt is None:
            return attributes, None
        if len(prompt) != len(attributes):
            raise ValueError(f"{len(attributes)} descriptions were given for {len(prompt)} prompts")
        return attributes, self.compression_model.encode(prompt.to(self.device))[0]

    def _generate_tokens(
        self,
        attributes: list[ConditioningAttributes],
        prompt_tokens: Tensor | None,
        progress: bool = False,
        seed: Seed = None,
    ) -> Tensor:
        """Tokens [B, K, int(duration * frame_rate)] over as many windows as the duration needs."""
        params = self.params()
        batch = len(attributes)
        seeds = request_seeds(seed, batch)
        windows = plan_windows(
            int(params.duration * self.frame_rate),
            int(self.max_duration * self.frame_rate),
            int(params.stride(self.max_duration) * self.frame_rate),
            0 if prompt_tokens is None else prompt_tokens.shape[2],
        )
        prompt = self.lm._checked_prompt(prompt_tokens, batch)
        conditions_of = self._conditions(attributes, params, seeds, windows)
        with self._progress(progress) as report:
            return self.lm.run(windows, prompt, conditions_of, params, seeds, report)

    def _conditions(
        self,
        attributes: list[ConditioningAttributes],
        params: GenerationParams,
        seeds: list[int] | None,
        windows: list[Window],
    ) -> Callable[[Window], Conditions]:
        """Text does not change over a generation: encoded once, for all windows."""
        conditions = self.lm.encode(attributes, params, seeds)
        return lambda window: conditions

    def _finish(self, tokens: Tensor, return_tokens: bool) -> Any:
        wav = self.generate_audio(tokens)
        return (wav, tokens) if return_tokens else wav

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


def checked_texts(descriptions: Sequence[str | None]) -> list[str | None]:
    """The descriptions as a list. A single string is refused: audiocraft would take each character for a request."""
    if isinstance(descriptions, str):
        raise TypeError(f"descriptions must be a list of texts, got a str: write [{descriptions[:40]!r}]")
    try:
        texts = list(descriptions)
    except TypeError:
        raise TypeError(f"descriptions must be a list of texts, got {type(descriptions).__name__}") from None
    if not texts:
        raise ValueError("descriptions is empty: nothing to generate")
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise TypeError(f"descriptions must hold texts or None, got {type(text).__name__}")
    return texts


def checked_audio(wav: Tensor, name: str, sample_rate: int) -> Tensor:
    """A waveform tensor that can be used: floating point, not empty, finite, at a positive rate."""
    if not isinstance(wav, Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(wav).__name__}")
    if not wav.is_floating_point():
        raise ValueError(f"{name} must hold floats in -1..1, got {wav.dtype}; divide integer PCM by its full scale")
    if wav.numel() == 0:
        raise ValueError(f"{name} holds no samples (shape {list(wav.shape)})")
    if not torch.isfinite(wav).all():
        raise ValueError(f"{name} holds NaN or infinite samples")
    if not sample_rate > 0:
        raise ValueError(f"the sample rate of {name} must be above 0 Hz, got {sample_rate}")
    return wav
