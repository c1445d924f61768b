"""From texts and waveforms to what the transformer sees: a prefix or cross-attention states per request and branch.

`Conditioner` makes the `Conditions` of `state.py`. The padding rules of the references live here and nowhere else: a
decoder attends to exactly the states that it is given.

    isolated (default)  every request is padded to the longest text among its own branches; padding of cross-attention
                        is not attended at all. What transformers does; equal to audiocraft at batch 1.
    audiocraft          every row is padded with zero vectors to the longest text of the batch, and they are attended.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..state import Branch, Conditions

COMPAT = ("isolated", "audiocraft")


class WavCondition(NamedTuple):
    """A waveform as a condition (audiocraft's fields). wav [1, C, n]; `length` 0 or a single sample mean "none".

    `sample_rate` holds one rate in Hz; `path` and `seek_time` (seconds) are audiocraft's, and not read.
    """

    wav: Tensor
    length: Tensor
    sample_rate: list[int]
    path: list[str | None] = []
    seek_time: list[float | None] = []


@dataclass
class ConditioningAttributes:
    """What one request asks for: audiocraft's class as far as MusicGen uses it, and two fields of our own.

    `text` holds the text under "description", `wav` the melody or style under "self_wav".
    """

    text: dict[str, str | None] = field(default_factory=dict)
    wav: dict[str, WavCondition] = field(default_factory=dict)
    separate: bool = True  # melody models: follow vocals and other, separated by demucs, or the mix as it is
    negative: str | None = None  # a text for the null branch: guidance then leads away from it


class Projections(Protocol):
    """What a transformer lends its conditioner: `text_proj` and `melody_proj` turn outputs into its width."""

    text_proj: nn.Linear | None
    melody_proj: nn.Linear | None

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        ...


class Conditioner:
    """Encodes the conditions of a model. Parts that a model lacks are None; so is a text encoder that was not found.

    Padding and null conditions are audiocraft's and transformers'; see the head of this file.

    Args:
        config: of the model. transformer: lends its projections.
        text: `TextEncoder`, its states projected here by the transformer's `text_proj`.
        style: `StyleConditioner`; the chromagram needs no module of its own.
    """

    def __init__(self, config: ModelConfig, transformer: Projections, text=None, style=None):
        self.config = config
        self.transformer = transformer
        self.text = text
        self.style = style
        self._chroma: Any = None  # the filter bank and demucs: made at the first melody that needs them
        self._demucs = None

    # -- text ---------------------------------------------------------------------------------------------------------

    def encode_text(self, text: str | None) -> Tensor | None:
        """[n, d] states of one text, projected; None for an empty one (its states are zeros, one position long).

        ValueError where the model came without a text encoder.
        """
        if not text:
            return None
        if self.text is None:
            raise ValueError(
                "this model was loaded without a text encoder or its tokenizer (spiece.model or tokenizer.json): pass "
                "text_encoder=, a folder or hub id of its T5, to get_pretrained, or generate unconditionally"
            )
        states = self.text.encode(text)
        projection = self.transformer.text_proj
        states = states.to(self.transformer.device)
        return states if projection is None else projection(states)

    def _zeros(self, length: int) -> Tensor:
        return torch.zeros(length, self.config.dim, device=self.transformer.device)

    def _padded(self, states: Tensor | None, length: int) -> Tensor:
        states = self._zeros(1) if states is None else states
        return torch.cat([states, self._zeros(length - len(states))]) if len(states) < length else states

    # -- waveforms ----------------------------------------------------------------------------------------------------

    def encode_melody(
        self, wav: Tensor | None, sample_rate: int, seed: int | None = None, separate: bool = True
    ) -> Tensor:
        """Chroma prefix [chroma_length, d] of `wav` [C, n] at `sample_rate` Hz; None: pitch class C throughout.

        `seed` and `separate`: see `melody_chroma`.
        """
        from .melody import ChromaExtractor, load_demucs, melody_chroma, null_chroma

        assert self.config.melody is not None and self.transformer.melody_proj is not None
        device = self.transformer.device
        if wav is None:
            chroma = null_chroma(self.config.melody)
        else:
            if separate and self._demucs is None:
                self._demucs = load_demucs(device)
            if self._chroma is None:
                self._chroma = ChromaExtractor(self.config.melody, device)
            chroma = melody_chroma(
                wav,
                sample_rate,
                self.config.melody,
                separate=separate,
                device=device,
                seed=seed,
                demucs=self._demucs,
                extractor=self._chroma,
            )
        return self.transformer.melody_proj(chroma.to(device))

    def _wav_prefixes(self, attributes: list[ConditioningAttributes], compat: str, seeds) -> tuple[list, list]:
        """(with the waveforms, null) prefixes per request, before the text; both empty lists for models without."""
        wavs = [_given_wav(a) for a in attributes]
        if self.config.melody is not None:
            if compat == "audiocraft":
                wavs = _pad_to_longest(wavs)
            null = self.encode_melody(None, 0)
            given = [null] * len(wavs)
            drawn = random.getstate()
            for b, (wav, request) in enumerate(zip(wavs, attributes, strict=True)):
                if wav is None:
                    continue
                if compat == "audiocraft" and seeds is None:
                    random.setstate(drawn)  # one call of demucs for the whole batch there: one shift for all
                seed = None if seeds is None else seeds[b]
                given[b] = self.encode_melody(*wav, seed=seed, separate=request.separate)
            return given, [null] * len(wavs)
        if self.config.style is not None:
            return self._style_prefixes(wavs, compat, seeds)
        return [], []

    def _style_prefixes(self, wavs: list, compat: str, seeds) -> tuple[list, list]:
        style = self.config.style
        if self.style is None or style is None:
            raise ValueError("this style model was loaded without its style conditioner")
        feature_rate = style.feature_rate / style.feature_hop
        samples = [0 if w is None else w[0].shape[-1] for w in wavs]
        if compat == "audiocraft":
            wavs = _pad_to_longest(wavs)
        given: list[Tensor | None] = [None] * len(wavs)
        start: int | None = None
        for b, wav in enumerate(wavs):
            if wav is None:
                continue
            if seeds is not None or start is None or compat == "isolated":
                start = self.style.draw_start(wav[0], wav[1], None if seeds is None else seeds[b])
            tokens = self.style(wav[0], wav[1], start=start)
            if compat == "audiocraft":  # masked by the length of the waveform, wherever the excerpt was taken
                tokens[math.ceil(samples[b] / (wav[1] / feature_rate * self.style.ds_factor)) :] = 0
            given[b] = tokens
        longest = max((len(g) for g in given if g is not None), default=1)
        lengths = [longest if compat == "audiocraft" else (1 if g is None else len(g)) for g in given]
        null = [self._zeros(n) for n in lengths]
        return [n if g is None else g for g, n in zip(given, null, strict=True)], null

    # -- the whole ----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        attributes: list[ConditioningAttributes],
        *,
        guidance: str = "cfg",
        compat: str = "isolated",
        two_step: bool = False,
        seeds: list[int] | None = None,
    ) -> Conditions:
        """Conditions for B requests.

        Args:
            attributes: one for each.
            guidance: 'none' (one branch), 'cfg' (conditional, null) or 'double' (text and wav, wav, null).
            compat: 'isolated' or 'audiocraft', see the head of this file.
            two_step: the null branch is padded on its own (audiocraft's two-step CFG).
            seeds: of the requests, for what conditioners draw; None draws from the global generators.
        """
        assert compat in COMPAT and guidance in ("none", "cfg", "double")
        texts = [self.encode_text(a.text.get("description")) for a in attributes]
        negative = [self.encode_text(a.negative) if guidance != "none" else None for a in attributes]
        if self.config.conditioning == "cross":
            return self._cross(texts, negative, guidance, compat)
        both = [_longer(t, n) for t, n in zip(texts, negative, strict=True)]
        lengths = [max(both)] * len(both) if compat == "audiocraft" else both
        given, null = self._wav_prefixes(attributes, compat, seeds)
        two_step &= guidance == "cfg"  # double guidance encodes its three branches together
        if two_step and self.config.style is not None:
            null = [self._zeros(1)] * len(null)
        null_lengths = [_longer(n) for n in negative] if two_step else lengths
        rows = [(given, [self._padded(t, n) for t, n in zip(texts, lengths, strict=True)])]
        if guidance == "double":
            rows.append((given, [self._zeros(n) for n in lengths]))
        if guidance != "none":
            rows.append((null, [self._padded(t, n) for t, n in zip(negative, null_lengths, strict=True)]))
        branches = [Branch(prefix=_join(wavs, text)) for wavs, text in rows]
        return Conditions(len(attributes), branches, {"none": 1, "cfg": 2, "double": 3}[guidance])

    def _cross(
        self, texts: list[Tensor | None], negative: list[Tensor | None], guidance: str, compat: str
    ) -> Conditions:
        branches = [Branch(cross=self._cross_states(texts, compat))]
        if guidance != "none":
            branches.append(Branch(cross=self._cross_states(negative, compat)))
        return Conditions(len(texts), branches, {"none": 1, "cfg": 2, "double": 3}[guidance])

    def _cross_states(self, texts: list[Tensor | None], compat: str) -> list[Tensor] | None:
        """States of every row; a text that is missing among others is zeros, which contribute exactly nothing."""
        if all(t is None for t in texts):
            return None
        lengths = [_longer(t) for t in texts]
        if compat == "audiocraft":
            lengths = [max(lengths)] * len(lengths)
        return [self._padded(t, n) for t, n in zip(texts, lengths, strict=True)]


def _longer(*texts: Tensor | None) -> int:
    """Positions of the longest of a request's texts; a missing one takes one."""
    return max(1 if t is None else len(t) for t in texts)


def _join(wavs: list[Tensor], texts: list[Tensor]) -> list[Tensor]:
    """Prefix of each row: the waveform's positions come before the text's."""
    return [torch.cat([w, t]) for w, t in zip(wavs, texts, strict=True)] if wavs else texts


def _given_wav(attributes: ConditioningAttributes) -> tuple[Tensor, int] | None:
    """(wav [C, n], sample rate) of a request, or None where there is none."""
    condition = attributes.wav.get("self_wav")
    if condition is None or int(condition.length.max()) == 0 or condition.wav.shape[-1] <= 1:
        return None
    return condition.wav[0], condition.sample_rate[0]


def _pad_to_longest(wavs: list) -> list:
    """audiocraft collates waveforms to mono and pads them with silence to the longest of the batch."""
    longest = max((w[0].shape[-1] for w in wavs if w is not None), default=0)
    return [
        None
        if w is None
        else (torch.nn.functional.pad(w[0].mean(0, keepdim=True), (0, longest - w[0].shape[-1])), w[1])
        for w in wavs
    ]
