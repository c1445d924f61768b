"""AudioGen: sound effects from text. The language model and loop of MusicGen, a 16 kHz codec, its own defaults."""

from __future__ import annotations

from pathlib import Path

import torch

from .config import GenerationParams
from .genmodel import GenerationModel
from .loading import load_parts


class AudioGen(GenerationModel):
    """audiocraft's `AudioGen` (Kreuk et al. 2022), call for call; the rest of its methods: `GenerationModel`.
    Rates in Hz, durations in seconds, sound [B, channels, samples], tokens [B, K, T].
    """

    @staticmethod
    def get_pretrained(
        name: str | Path = "facebook/audiogen-medium",
        device: str | torch.device | None = None,
        *,
        text_encoder: str | Path | None = None,
        precision: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        base: str | Path | None = None,
        adapter: str | Path | None = None,
        adapter_scale: float = 1.0,
    ) -> AudioGen:
        """Load a model; the arguments are those of `MusicGen.get_pretrained`, and so are its errors.

        Raises:
            ValueError: a melody or style model.
        """
        parts = load_parts(
            name, device, text_encoder, precision, revision, cache_dir, None, base, adapter, adapter_scale
        )
        if parts.lm.config.melody is not None or parts.lm.config.style is not None:
            raise ValueError(f"{parts.name} is conditioned on audio: load it with MusicGen.get_pretrained")
        return AudioGen(parts.name, parts.codec, parts.lm)

    def _defaults(self) -> GenerationParams:
        return GenerationParams(duration=5.0, extend_stride=self._stride(None))

    def _stride(self, given: float | None) -> float | None:
        """audiocraft's 2 s where the window leaves room for it."""
        return 2.0 if given is None and self.max_duration > 2 else given

    def set_generation_params(
        self,
        use_sampling: bool = True,
        top_k: int = 250,
        top_p: float = 0.0,
        temperature: float = 1.0,
        duration: float = 10.0,
        cfg_coef: float = 3.0,
        two_step_cfg: bool = False,
        extend_stride: float | None = None,
    ) -> None:
        """Set ALL generation parameters, audiocraft's order and defaults; see `MusicGen.set_generation_params`.

        `extend_stride` not given means 2 s, or 0.6 x the window where that is shorter than 2 s.
        """
        self._apply(
            GenerationParams(
                use_sampling=use_sampling,
                top_k=top_k,
                top_p=top_p,
                temperature=temperature,
                duration=duration,
                cfg_coef=cfg_coef,
                two_step_cfg=two_step_cfg,
                extend_stride=self._stride(extend_stride),
            )
        )
