"""The language model as scripts use it: audiocraft's `LMModel.generate` on this project's engine.

Ties together the transformer, its conditioner and a decoder, and translates audiocraft's arguments (precedences
included) into `Conditions`, windows and a `Sampler`. Tokens only: no codec, no audio files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import engine
from .conditioning import COMPAT, Conditioner, ConditioningAttributes
from .config import GenerationParams, ModelConfig
from .decoder_for import decoder_for
from .decoders.cpu_model import PackedTransformer
from .lanes import Decoder
from .model import Transformer
from .sampling import SamplingParams, signed_seed
from .state import Conditions, Sampler
from .windows import Window, WindowPlan, plan_windows

Seed = int | Sequence[int] | None  # none, one for the whole batch, or one for each request


class LMModel:
    """A conditioned language model over codec tokens (audiocraft `LMModel`; Copet et al. 2023).

    `cfg` is the configuration that the checkpoint came with, or None, kept for scripts.
    Attributes (audiocraft's names): `cfg_coef`, `two_step_cfg`, `special_token_id`, `num_codebooks`, `n_q`, `card`,
    `dim`, `condition_provider`; plus `config`, `transformer`, `conditioner`, `decoder`, and `compat`, see
    `conditioning`.
    """

    def __init__(self, transformer: Transformer | PackedTransformer, conditioner: Conditioner, cfg: object = None):
        self.config: ModelConfig = transformer.config
        self.transformer = transformer
        self.conditioner = conditioner
        self.decoder: Decoder = decoder_for(transformer)
        self.cfg = cfg
        self.cfg_coef = self.config.cfg_coef
        self.two_step_cfg = self.config.two_step_cfg
        self._compat = "isolated"
        parts: dict[str, Any] = {"description": conditioner.text}
        if self.config.melody is not None or self.config.style is not None:
            # what scripts set on audiocraft's melody conditioner is what this one always does
            melody = SimpleNamespace(match_len_on_eval=True, _use_masking=False)
            parts = {"self_wav": conditioner.style or melody, **parts}
        self.condition_provider = SimpleNamespace(conditioners=parts)

    @property
    def compat(self) -> str:
        """'isolated' or 'audiocraft', see `conditioning`; setting anything else is a ValueError."""
        return self._compat

    @compat.setter
    def compat(self, value: str) -> None:
        if value not in COMPAT:
            raise ValueError(f"compat must be one of {', '.join(COMPAT)}, got {value!r}")
        self._compat = value

    @property
    def special_token_id(self) -> int:
        """Of cells without a frame; one above the last code."""
        return self.config.special_token

    @property
    def num_codebooks(self) -> int:
        """K."""
        return self.config.num_codebooks

    @property
    def n_q(self) -> int:
        """K, by audiocraft's other name."""
        return self.config.num_codebooks

    @property
    def card(self) -> int:
        """V, the codes of a codebook."""
        return self.config.vocab_size

    @property
    def dim(self) -> int:
        """d, the width of the transformer."""
        return self.config.dim

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.device

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The transformer's parameters (scripts ask the first one for its device)."""
        return self.transformer.parameters()

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor | None = None,
        conditions: Sequence[ConditioningAttributes] | Conditions = (),
        num_samples: int | None = None,
        max_gen_len: int = 256,
        use_sampling: bool = True,
        temp: float = 1.0,
        top_k: int = 250,
        top_p: float = 0.0,
        cfg_coef: float | None = None,
        cfg_coef_beta: float | None = None,
        two_step_cfg: bool | None = None,
        remove_prompts: bool = False,
        check: bool = False,
        callback: Callable[[int, int], None] | None = None,
        *,
        seed: int | Sequence[int] | None = None,
    ) -> Tensor:
        """Tokens [B, K, max_gen_len] of one window (audiocraft `LMModel.generate`, its order of arguments).

        Args:
            prompt: int64 [B, K, P] tokens to continue, P < max_gen_len.
            conditions: one `ConditioningAttributes` per request, or finished `Conditions`. None at all generates
                unconditionally, without guidance.
            num_samples: B where neither prompt nor conditions tell it.
            max_gen_len: frames, the prompt's included; remove_prompts: return those behind it only.
            use_sampling, temp, top_k, top_p, cfg_coef_beta: as for `MusicGen.set_generation_params`.
            cfg_coef, two_step_cfg: None takes the checkpoint's.
            check: kept for compatibility; the sequence is always consistent.
            callback: called with (steps done, steps in all).
            seed: None draws from torch's global generator, as audiocraft does; otherwise see `MusicGen.generate`.

        Raises:
            ValueError: shapes that do not fit each other, tokens outside of the vocabulary, a prompt without room.
        """
        batch = self._batch_size(prompt, conditions, num_samples)
        prompt = self._checked_prompt(prompt, batch)
        params = GenerationParams(
            use_sampling=use_sampling,
            top_k=top_k,
            top_p=top_p,
            temperature=temp,
            cfg_coef=self.cfg_coef if cfg_coef is None else cfg_coef,
            cfg_coef_beta=cfg_coef_beta,
            two_step_cfg=self.two_step_cfg if two_step_cfg is None else two_step_cfg,
        )
        if not isinstance(conditions, Conditions):
            attributes = list(conditions) or [ConditioningAttributes() for _ in range(batch)]
            conditions = self.encode(attributes, params, seeds=request_seeds(seed, batch))
        windows = plan_windows(max_gen_len, max_gen_len, max_gen_len, prompt.shape[2])
        tokens = self.run(windows, prompt, lambda _: conditions, params, request_seeds(seed, batch), callback)
        return tokens[:, :, prompt.shape[2] :] if remove_prompts else tokens

    def encode(
        self,
        attributes: list[ConditioningAttributes],
        params: GenerationParams,
        seeds: list[int] | None = None,
        first_frame: int = 0,
    ) -> Conditions:
        """Conditions of the window that begins at `first_frame`: the branches that `params` need, encoded.

        One of `attributes` a request. What a conditioner draws (style excerpt, demucs shift) comes from the `seeds`
        too, anew for every window.
        """
        unconditional = not any(a.text.get("description") or a.wav for a in attributes)
        guidance = "cfg"
        if params.cfg_coef_beta is not None:
            guidance = "double"
        elif self._coefficient(params) == 1 or unconditional:
            guidance = "none"  # u + (c - u) * 1 is c, and without a condition c is u: the same law, half the rows
        if seeds is not None:
            seeds = [(s << 32) + first_frame for s in seeds]
        return self.conditioner(
            attributes, guidance=guidance, compat=self.compat, two_step=params.two_step_cfg, seeds=seeds
        )

    def run(
        self,
        windows: list[Window],
        prompt: Tensor,
        conditions_of: Callable[[Window], Conditions],
        params: GenerationParams,
        seeds: list[int] | None,
        callback: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Tokens [B, K, T] over any number of windows; see `engine.generate`.

        `prompt` int64 [B, K, P]; `conditions_of` gives the conditions of a window; `params` and `seeds` are those of
        `sampler`; `callback` is called with (steps done, steps in all).
        """
        sampler = self.sampler(params, len(prompt), seeds)
        return engine.generate(self.decoder, windows, prompt, conditions_of, sampler, callback)

    def stream(
        self,
        plan: WindowPlan,
        prompt: Tensor,
        conditions_of: Callable[[Window], Conditions],
        params: GenerationParams,
        seeds: list[int] | None,
        *,
        shadow: bool = True,
        guidance: Sequence[engine.Guidance | None] = (),
        changes: Sequence[engine.Change] = (),
        saved: dict[str, Any] | None = None,
    ) -> engine.Generation:
        """The same tokens as `run`, step by step and over any `plan`, endless ones included; see `engine.Generation`.

        `prompt` int64 [B, K, P], `conditions_of`, `params`, `seeds` as there; `shadow`, `guidance`, `changes` and
        `saved` go to `engine.Generation`.
        """
        sampler = self.sampler(params, len(prompt), seeds)
        return engine.Generation(
            self.decoder,
            plan,
            prompt,
            conditions_of,
            sampler,
            shadow=shadow,
            guidance=guidance,
            changes=changes,
            saved=saved,
        )

    def sampler(self, params: GenerationParams, batch: int, seeds: list[int] | None) -> Sampler:
        """How `batch` requests draw with these `params`; `seeds` None draws from torch's global generator.

        audiocraft's precedence: greedy without sampling or at temperature <= 0; top_p switches top_k off.
        """
        greedy = not params.use_sampling or params.temperature <= 0
        tensors = SamplingParams.build(
            batch,
            self.config.num_codebooks,
            self.device,
            cfg_coef=self._coefficient(params),
            cfg_coef_beta=params.cfg_coef_beta,
            temperature=0.0 if greedy else params.temperature,
            top_k=0 if params.top_p > 0 else params.top_k,
            top_p=max(params.top_p, 0.0),
        )
        counted = None if seeds is None else torch.tensor(seeds, dtype=torch.int64, device=self.device)
        return Sampler(tensors, counted)

    def _coefficient(self, params: GenerationParams) -> float:
        """audiocraft's two-step branch reads the model's coefficient, not the argument; so does its compat mode."""
        ignored = self.compat == "audiocraft" and params.two_step_cfg and params.cfg_coef_beta is None
        return self.cfg_coef if ignored else params.cfg_coef

    def _batch_size(self, prompt: Tensor | None, conditions, num_samples: int | None) -> int:
        sizes = {}
        if num_samples is not None:
            sizes["num_samples"] = num_samples
        if prompt is not None:
            sizes["prompt"] = len(prompt)
        if isinstance(conditions, Conditions):
            sizes["conditions"] = conditions.batch
        elif len(conditions):
            sizes["conditions"] = len(conditions)
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the numbers of requests differ: {sizes}")
        batch = next(iter(sizes.values()), 1)
        if batch < 1:
            raise ValueError("nothing to generate: zero requests")
        return batch

    def _checked_prompt(self, prompt: Tensor | None, batch: int) -> Tensor:
        num_codebooks, vocab = self.config.num_codebooks, self.config.vocab_size
        if prompt is None:
            return torch.zeros(batch, num_codebooks, 0, dtype=torch.int64, device=self.device)
        if prompt.dim() != 3 or prompt.shape[1] != num_codebooks or prompt.is_floating_point():
            raise ValueError(
                f"prompt tokens must be integers [B, {num_codebooks}, frames], got {prompt.dtype} {list(prompt.shape)}"
            )
        if prompt.numel() and not (0 <= int(prompt.min()) and int(prompt.max()) < vocab):
            raise ValueError(f"prompt tokens must lie in 0..{vocab - 1}")
        return prompt.to(self.device, torch.int64)


def request_seeds(seed: Seed, batch: int) -> list[int] | None:
    """One signed 64-bit seed per request: an int s gives request b the seed s + b; a list has one for each."""
    if seed is None:
        return None
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        seeds = [signed_seed(s) for s in seed]
        if len(seeds) != batch:
            raise ValueError(f"{len(seeds)} seeds were given for {batch} requests")
        return seeds
    first = signed_seed(seed)
    return [signed_seed((first + b) % 2**64) for b in range(batch)]
