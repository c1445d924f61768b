"""MusicGen: the drop-in class. Text, melody, style, continuation; mono and stereo; any duration.

    from musicgen_fast import MusicGen
    model = MusicGen.get_pretrained("facebook/musicgen-small")
    wav = model.generate(["lofi beat with warm piano"], seed=7)

Start here, then read `genmodel.py` (what it shares with AudioGen), `lm.py`, `engine.py`, `decoders/torch.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .audio import convert_audio
from .checks import Negative, checked_audio, checked_texts
from .conditioning import ConditioningAttributes, WavCondition
from .config import GenerationParams
from .genmodel import GenerationModel
from .lm import Seed
from .loading import load_parts
from .sections import Sections
from .state import Conditions
from .stream import Stream
from .streaming import Options, Schedule
from .windows import Window

Melody = Tensor | Sequence[Tensor | None]


class MusicGen(GenerationModel):
    """audiocraft's `MusicGen` (Copet et al. 2023), call for call; the rest of its methods: `GenerationModel`.
    Rates in Hz, durations in seconds, sound [B, channels, samples], tokens [B, K, T].
    """

    @staticmethod
    def get_pretrained(
        name: str | Path = "facebook/musicgen-melody",
        device: str | torch.device | None = None,
        *,
        text_encoder: str | Path | None = None,
        style_encoder: str | Path | None = None,
        precision: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        base: str | Path | None = None,
        adapter: str | Path | None = None,
        adapter_scale: float = 1.0,
    ) -> MusicGen:
        """Load a model.

        Args:
            name: a hub id, a short name (small, medium, large, melody, style), a local folder in transformers' or
                audiocraft's layout, a fine-tune in one file (see `base`), "demo" for the small chip-tune model that
                comes with this package (no network; see assets/demo/README.md), or "random:small[-stereo][-melody]"
                for random weights of a released size.
            device: 'cpu', 'cuda' or 'cuda:N'; default: 'cuda' where there is a GPU, else 'cpu'.
            text_encoder: folder or hub id of the T5, for audiocraft folders that come without one.
            style_encoder: folder or hub id of MERT for style models; default: a folder mert/ beside, else the hub's.
            precision: of the matrices: 'float32', 'float16' or 'bfloat16'; on a CPU also 'int8' (a quarter of the
                memory, 3 to 4 times as fast as float32) and 'int4' (worse sound); 'auto' is int8 on a CPU. Default:
                float32 on a CPU (the reference's tokens), float16 on a GPU. The residual stream and the norms are
                fp32 in any case.
            revision, cache_dir: as in huggingface_hub. With HF_HUB_OFFLINE=1 nothing is asked of the network.
            base: the model that a fine-tune was trained from. It lends what the fine-tune's files lack: to a file with
                a language model alone (`lm.state_dict()`, Lightning's last.ckpt) configuration, codec and T5.
            adapter: folder or hub id of a LoRA adapter of PEFT, merged into the weights while they load.
            adapter_scale: multiplies the adapter's update; 1 is the adapter as trained, 0 the model without it.

        Raises:
            CheckpointError: nothing there, damaged or unsupported files, missing keys; names the file and the key.
        """
        parts = load_parts(
            name, device, text_encoder, precision, revision, cache_dir, style_encoder, base, adapter, adapter_scale
        )
        return MusicGen(parts.name, parts.codec, parts.lm)

    def set_generation_params(
        self,
        use_sampling: bool = True,
        top_k: int = 250,
        top_p: float = 0.0,
        temperature: float = 1.0,
        duration: float = 30.0,
        cfg_coef: float = 3.0,
        cfg_coef_beta: float | None = None,
        two_step_cfg: bool = False,
        extend_stride: float | None = None,
    ) -> None:
        """Set ALL generation parameters: what is not named returns to its default, as in audiocraft.

        Args:
            use_sampling: False takes the most likely token.
            top_k: keep the k most likely tokens (all that tie with the k-th too); 0 or less: off.
            top_p: keep the most likely tokens up to this mass; above 0 it takes the place of top_k.
            temperature: divides the logits; 0 or less: greedy.
            duration: seconds, a prompt included.
            cfg_coef: classifier-free guidance; 1 runs without the null branch.
            cfg_coef_beta: double guidance of style models: how far the text is pushed beyond the style.
            two_step_cfg: pad the null branch on its own.
            extend_stride: seconds between windows beyond `max_duration`; default min(18, 0.6 * max_duration).

        Raises:
            ValueError: NaN, a duration that is not above 0, a stride that is not below `max_duration`.
        """
        self._apply(
            GenerationParams(
                use_sampling=use_sampling,
                top_k=top_k,
                top_p=top_p,
                temperature=temperature,
                duration=duration,
                cfg_coef=cfg_coef,
                cfg_coef_beta=cfg_coef_beta,
                two_step_cfg=two_step_cfg,
                extend_stride=extend_stride,
            )
        )

    def set_style_conditioner_params(
        self,
        eval_q: int = 3,
        excerpt_length: float = 3.0,
        ds_factor: int | None = None,
        encodec_n_q: int | None = None,
    ) -> None:
        """Parameters of the style conditioner (audiocraft `MusicGen.set_style_conditioner_params`).

        Args:
            eval_q: codebooks of its quantiser that are used, 1 to 6; fewer keep less of the excerpt.
            excerpt_length: seconds of the excerpt.
            ds_factor: every how many frames of MERT one becomes a token; None leaves it.
            encodec_n_q: kept, but without effect.

        Raises:
            ValueError: this is not a style model, or a value out of range.
        """
        if self.lm.conditioner.style is None:
            raise ValueError(f"{self.name} has no style conditioner; load facebook/musicgen-style or a fine-tune of it")
        self.lm.conditioner.style.set_params(eval_q, excerpt_length, ds_factor, encodec_n_q)

    def generate_with_chroma(
        self,
        descriptions: Sequence[str | None],
        melody_wavs: Melody,
        melody_sample_rate: int,
        progress: bool = False,
        return_tokens: bool = False,
        *,
        separate: bool = True,
        seed: Seed = None,
        negative_prompt: Negative = None,
    ) -> Any:
        """Music that follows a melody (melody models) or a style excerpt (style models).

        Args:
            descriptions: B texts or None.
            progress, return_tokens: see `generate`, and there for what is returned.
            melody_wavs: [B, C, n], [C, n] or a list of B [C, n] waveforms; None in the list means none for this one.
            melody_sample_rate: Hz, of all of them.
            separate: melody models follow the vocals and other instruments that demucs separates; False follows the mix
                and needs no demucs. No effect on style models.
            seed: see `generate`; also fixes the style excerpt and the shift of demucs.
            negative_prompt: see `generate`.

        Raises:
            RuntimeError: the model takes text only.
            TypeError, ValueError: texts or waveforms that cannot be used, or not as many of one as of the other.
            ImportError: demucs is needed and missing.
        """
        texts = checked_texts(descriptions)
        melodies = self._checked_melodies(melody_wavs, melody_sample_rate, len(texts))
        attributes, prompt = self._prepare_tokens_and_attributes(texts, None, melodies)
        for request in attributes:
            request.separate = separate
        self._set_negatives(attributes, negative_prompt)
        return self._finish(self._generate_tokens(attributes, prompt, progress, seed), return_tokens)

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
        melody_wavs: Melody | None = None,
        melody_sample_rate: int | None = None,
        separate: bool = True,
    ) -> Stream:
        """Music while it is made: as in `GenerationModel.stream`, with a melody or a style.

        Args:
            melody_wavs, melody_sample_rate, separate: see `generate_with_chroma`; [B, C, n] or a list, Hz.

        Raises:
            RuntimeError: a melody for a model that takes text only.
        """
        told, parts = self._stream_texts(descriptions, prompt, sections, duration, crossfade)
        attributes, tokens = self._stream_inputs(
            told, duration, prompt, prompt_sample_rate, negative_prompt, cfg_coef is not None
        )
        if (melody_wavs is None) != (melody_sample_rate is None):
            raise ValueError("melody_wavs and melody_sample_rate belong together: give both or neither")
        if melody_wavs is not None and melody_sample_rate is not None:
            melodies = self._checked_melodies(melody_wavs, melody_sample_rate, len(attributes))
            self._set_melodies(attributes, melodies, separate)
        options = Options(duration, chunk_seconds, fade_out, cfg_coef, temperature, parts, crossfade)
        return self._open_stream(attributes, tokens, seed, options)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _checked_melodies(self, melody_wavs: Melody, sample_rate: int, count: int) -> list[Tensor | None]:
        """One waveform [C, n] at the model's rate and channels per request."""
        if self.lm.config.melody is None and self.lm.config.style is None:
            raise RuntimeError(
                f"{self.name} takes no melody or style audio: use a melody or style model, "
                "or generate_continuation to start from audio"
            )
        if isinstance(melody_wavs, Tensor):
            melody_wavs = melody_wavs[None] if melody_wavs.dim() == 2 else melody_wavs
            if melody_wavs.dim() != 3:
                raise ValueError(f"melody_wavs must be [B, C, n] or [C, n], got {list(melody_wavs.shape)}")
        melodies = list(melody_wavs)
        if len(melodies) != count:
            raise ValueError(f"{len(melodies)} melodies were given for {count} descriptions")
        out: list[Tensor | None] = []
        for melody in melodies:
            if melody is None:
                out.append(None)
                continue
            melody = checked_audio(melody, "melody_wavs", sample_rate)
            if melody.dim() != 2:
                raise ValueError(f"each melody must be a waveform [C, n], got {list(melody.shape)}")
            melody = convert_audio(melody.float(), sample_rate, self.sample_rate, self.audio_channels)
            out.append(melody if melody.shape[-1] > 1 else None)  # a single sample is audiocraft's sign for "none"
        return out

    def _prepare_tokens_and_attributes(
        self,
        descriptions: Sequence[str | None],
        prompt: Tensor | None,
        melody_wavs: Sequence[Tensor | None] | None = None,
    ) -> tuple[list[ConditioningAttributes], Tensor | None]:
        attributes, tokens = super()._prepare_tokens_and_attributes(descriptions, prompt)
        self._set_melodies(attributes, melody_wavs or [None] * len(attributes))
        return attributes, tokens

    def _set_melodies(
        self, attributes: list[ConditioningAttributes], melodies: Sequence[Tensor | None], separate: bool = True
    ) -> None:
        for request, melody in zip(attributes, melodies, strict=True):
            request.separate = separate
            if melody is not None:
                request.wav["self_wav"] = self._wav_condition(melody)

    def _wav_condition(self, melody: Tensor) -> WavCondition:
        length = torch.tensor([melody.shape[-1]])
        return WavCondition(melody[None].to(self.device), length, [self.sample_rate], [None])

    def _conditions(
        self,
        attributes: list[ConditioningAttributes],
        params: GenerationParams,
        seeds: list[int] | None,
        windows: list[Window],
    ) -> Callable[[Window], Conditions]:
        """A waveform is cut anew for every window: it plays on, from its start again where it ends."""
        if len(windows) == 1 or not any(a.wav for a in attributes):
            return super()._conditions(attributes, params, seeds, windows)

        def conditions_of(window: Window) -> Conditions:
            cut = [self._cut(request, window.start / self.frame_rate) for request in attributes]
            return self.lm.encode(cut, params, seeds, window.start)

        return conditions_of

    def _cut(self, request: ConditioningAttributes, seconds: float) -> ConditioningAttributes:
        """`max_duration` seconds of the request's waveform from `seconds` on, repeated periodically."""
        condition = request.wav.get("self_wav")
        if condition is None:
            return request
        wav = condition.wav[0]
        index = torch.arange(int(self.max_duration * self.sample_rate), device=wav.device)
        index = (index + int(seconds * self.sample_rate)) % wav.shape[-1]
        cut = {"self_wav": self._wav_condition(wav[:, index])}
        return ConditioningAttributes(request.text, cut, request.separate)
