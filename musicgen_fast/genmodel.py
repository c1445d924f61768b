"""What MusicGen and AudioGen share: ways of generating, windows, prompts, streams, tokens to audio.

The public methods have audiocraft's names, arguments and defaults (`BaseGenModel`), with `seed=` added. Encoding of the
conditions and the drawing of tokens happen in `lm.py`; audio files in `audio.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .audio import convert_audio
from .checks import Negative, checked_audio, checked_negatives, checked_texts
from .conditioning import ConditioningAttributes
from .config import GenerationParams
from .lm import Seed, request_seeds
from .sections import Section, Sections, checked_sections
from .settings import Settings
from .state import Conditions
from .stream import Stream
from .streaming import Options, Schedule, open_stream, resume_stream
from .windows import Window, plan_windows


class GenerationModel(Settings):
    """audiocraft's `BaseGenModel`; what can be read and set on it stands in `Settings`."""

    # -- ways of generating -------------------------------------------------------------------------------------------

    def generate(
        self,
        descriptions: Sequence[str | None],
        progress: bool = False,
        return_tokens: bool = False,
        *,
        seed: Seed = None,
        negative_prompt: Negative = None,
    ) -> Any:
        """Music for each description.

        Args:
            descriptions: B texts; None or "" is a request without a text.
            progress: show a bar on stderr, or call the custom callback.
            return_tokens: return the tokens as well.
            seed: None draws from torch's global generator (audiocraft's tokens for the same `torch.manual_seed`). An
                int s gives request b the seed s + b, a list one to each: then a request's tokens depend on the
                weights, its parameters and its seed alone.
            negative_prompt: what guidance leads away from: a text for all requests, or one (or None) for each.

        Returns:
            wav [B, channels, samples] float32 on the model's device (not clipped), or (wav, tokens int64 [B, K, T]).

        Raises:
            TypeError, ValueError: descriptions that are not a list of texts, parameters that cannot be used.
        """
        attributes, prompt = self._prepare_tokens_and_attributes(descriptions, None)
        self._set_negatives(attributes, negative_prompt)
        return self._finish(self._generate_tokens(attributes, prompt, progress, seed), return_tokens)

    def generate_unconditional(
        self, num_samples: int, progress: bool = False, return_tokens: bool = False, *, seed: Seed = None
    ) -> Any:
        """`num_samples` pieces without any condition: TypeError, ValueError for no such number. Else see `generate`."""
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
        negative_prompt: Negative = None,
    ) -> Any:
        """Continue recordings. The duration includes them; they come back as the codec hears them.

        Args:
            prompt: [B, C, n] or [C, n] waveform, any rate and channels.
            prompt_sample_rate: its rate in Hz.
            descriptions: one per recording, or None.
            progress, return_tokens, seed, negative_prompt: see `generate`, and there for what is returned.

        Raises:
            ValueError: NaN, no samples, a wrong shape, or a prompt that leaves nothing to generate.
        """
        prompt = self._prompt_audio(prompt, prompt_sample_rate, self.duration)
        descriptions = [None] * len(prompt) if descriptions is None else descriptions
        attributes, tokens = self._prepare_tokens_and_attributes(descriptions, prompt)
        self._set_negatives(attributes, negative_prompt)
        return self._finish(self._generate_tokens(attributes, tokens, progress, seed), return_tokens)

    def stream(
        self,
        descriptions: Sequence[str | None] | None = None,
        *,
        duration: float | None = None,
        chunk_seconds: float = 1.0,
        seed: Seed = None,
        negative_prompt: Negative = None,
        prompt: Tensor | None = None,
        prompt_sample_rate: int | None = None,
        cfg_coef: Schedule | None = None,
        temperature: Schedule | None = None,
        fade_out: float = 0.0,
        sections: Sections | None = None,
        crossfade: float = 0.5,
    ) -> Stream:
        """Music while it is made: an iterator of `Chunk(audio, tokens, start_seconds)`; see `Stream`.

        The other parameters are those of `set_generation_params`, and the tokens those of `generate`.

        Args:
            descriptions: B texts; None: one request without a text, or as many as there are prompts.
            duration: seconds, a prompt included; None: without end, in constant memory.
            chunk_seconds: of the largest chunks. The first one comes after eight steps, each is twice the last.
            seed, negative_prompt: see `generate`.
            prompt, prompt_sample_rate: recordings to continue and their Hz, as in `generate_continuation`; they lead.
            cfg_coef, temperature: functions of the seconds from the start, asked at every step.
            fade_out: seconds of a linear fade at the end.
            sections: [(seconds, description), ...] in the place of descriptions; `Section` also sets guidance and
                temperature. The first starts at 0. Models with cross-attention only (not melody, not style).
            crossfade: seconds over which a section takes over from the one before.

        Raises:
            TypeError, ValueError: what cannot be used, before anything is generated.
        """
        told, parts = self._stream_texts(descriptions, prompt, sections, duration, crossfade)
        attributes, tokens = self._stream_inputs(
            told, duration, prompt, prompt_sample_rate, negative_prompt, cfg_coef is not None
        )
        options = Options(duration, chunk_seconds, fade_out, cfg_coef, temperature, parts, crossfade)
        return self._open_stream(attributes, tokens, seed, options)

    def resume(
        self, saved: dict[str, Any], *, cfg_coef: Schedule | None = None, temperature: Schedule | None = None
    ) -> Stream:
        """Go on where `Stream.save` was called, with the same weights: the tokens are those of the stream that never
        stopped. Functions cannot be saved: pass the same `cfg_coef` and `temperature` again.

        Raises:
            ValueError: not a saved stream, or one of another model.
        """
        return resume_stream(self, saved, cfg_coef, temperature)

    @torch.no_grad()
    def generate_audio(self, gen_tokens: Tensor) -> Tensor:
        """Tokens [B, K, T] -> wav [B, channels, samples]."""
        return self.compression_model.decode(gen_tokens, None)

    # -- inside (the names that forks of audiocraft use) --------------------------------------------------------------

    def _prompt_audio(self, prompt: Tensor, sample_rate: int, duration: float | None) -> Tensor:
        """A recording to continue as [B, C, n] at the model's rate; ValueError where nothing is left to generate."""
        prompt = checked_audio(prompt, "prompt", sample_rate)
        prompt = prompt[None] if prompt.dim() == 2 else prompt
        if prompt.dim() != 3:
            raise ValueError(f"prompt must be a waveform [B, C, n] or [C, n], got {list(prompt.shape)}")
        seconds = prompt.shape[2] / sample_rate
        if duration is not None and seconds >= duration:
            raise ValueError(
                f"the prompt ({seconds:.2f} s) is as long as the audio to generate ({duration} s, prompt included): "
                "set a longer duration or cut the prompt"
            )
        return convert_audio(prompt.float(), sample_rate, self.sample_rate, self.audio_channels)

    def _set_negatives(
        self, attributes: list[ConditioningAttributes], negative: Negative, scheduled: bool = False
    ) -> None:
        """`scheduled`: guidance is a function of time, whatever cfg_coef says."""
        texts = [request.text.get("description") for request in attributes]
        for request, text in zip(attributes, checked_negatives(negative, texts), strict=True):
            request.negative = text
        unguided = self.params().cfg_coef == 1 and self.params().cfg_coef_beta is None and not scheduled
        if negative is not None and unguided:
            raise ValueError("a negative prompt needs guidance: set a cfg_coef other than 1")

    def _stream_texts(
        self,
        descriptions: Sequence[str | None] | None,
        prompt: Tensor | None,
        sections: Sections | None,
        duration: float | None,
        crossfade: float,
    ) -> tuple[Sequence[str | None], tuple[Section, ...]]:
        """A text for each request, and the sections if there are any: the texts are then those of the first."""
        count = len(prompt) if isinstance(prompt, Tensor) and prompt.dim() == 3 else 1
        if sections is None:
            return [None] * count if descriptions is None else descriptions, ()
        if descriptions is not None:
            raise ValueError("give descriptions or sections, not both: each section has its own description")
        if self.lm.config.conditioning != "cross":
            raise ValueError(f"{self.name} takes its text as a prefix: sections need a model with cross-attention")
        parts = checked_sections(sections, duration, crossfade)
        return [parts[0].description] * count, tuple(parts)

    def _stream_inputs(
        self,
        descriptions: Sequence[str | None],
        duration: float | None,
        prompt: Tensor | None,
        prompt_sample_rate: int | None,
        negative: Negative,
        scheduled: bool,
    ) -> tuple[list[ConditioningAttributes], Tensor | None]:
        if (prompt is None) != (prompt_sample_rate is None):
            raise ValueError("prompt and prompt_sample_rate belong together: give both or neither")
        if prompt is not None and prompt_sample_rate is not None:
            prompt = self._prompt_audio(prompt, prompt_sample_rate, duration)
        attributes, tokens = self._prepare_tokens_and_attributes(descriptions, prompt)
        self._set_negatives(attributes, negative, scheduled)
        return attributes, tokens

    def _open_stream(
        self, attributes: list[ConditioningAttributes], tokens: Tensor | None, seed: Seed, options: Options
    ) -> Stream:
        batch = len(attributes)
        prompt = self.lm._checked_prompt(tokens, batch)
        return open_stream(self, attributes, prompt, self.params(), request_seeds(seed, batch), options)

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
