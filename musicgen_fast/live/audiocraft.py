"""audiocraft's MusicGen and AudioGen on our engine: one method of theirs, `lm.generate`, becomes ours.

The conditions are encoded and fused by the live object, with its batch padding, demucs and random numbers; what its
fuser makes of them is given to our decoder. Windows, prompts, progress, parameters and sound stay audiocraft's.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints.audiocraft import names_in_file
from ..config import ModelConfig, PatternConfig
from ..pattern import build_pattern
from ..state import Branch, Conditions
from .handle import HANDLE, LiveModel, own_precision, warn_unsupported
from .weights import Weights, convert

_OURS = ("emb.", "transformer.", "out_norm.", "linears.")


class LiveAudiocraft(LiveModel):
    """An accelerated `MusicGen` or `AudioGen`. Its target is the language model, whose `generate` it stands in for."""

    @staticmethod
    def target_of(model: Any) -> Any:
        return getattr(model, "lm", model)  # a deep copy is made for the copied language model

    @property
    def config(self) -> ModelConfig:
        """The live model's. ValueError for options that our transformer does not have."""
        lm = self.target
        body, layer = lm.transformer, lm.transformer.layers[0]
        _check_architecture(lm)
        return ModelConfig(
            dim=lm.dim,
            num_layers=len(body.layers),
            num_heads=layer.self_attn.num_heads,
            ffn_dim=layer.linear1.out_features,
            num_codebooks=lm.n_q,
            vocab_size=lm.card,
            pattern=_pattern(lm.pattern_provider, lm.n_q),
            conditioning="prefix" if layer.cross_attention is None else "cross",
            text=None,  # texts and melodies arrive projected
            cfg_coef=lm.cfg_coef,
        )

    def parameters(self) -> dict[str, Tensor]:
        """Attention of torch's own module is one level deeper (`self_attn.mha.`)."""
        named = self.target.named_parameters(remove_duplicate=False)
        return {n.replace("self_attn.mha.", "self_attn.").replace("cross_attention.mha.", "cross_attention."): p
                for n, p in named if n.startswith(_OURS)}  # fmt: skip

    def convert(self) -> Weights:
        config = self.config
        return convert(config, names_in_file(config), self.parameters())

    def install(self, model: Any) -> None:
        vars(model)[HANDLE] = self
        vars(model.lm)["generate"] = self.generate

    def remove(self, model: Any) -> None:
        vars(model).pop(HANDLE, None)
        target = self._target()  # gone where the caller has put another one in its place
        if target is not None:
            vars(target).pop("generate", None)

    # -- in the place of LMModel.generate -----------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens [B, K, T]: audiocraft's `LMModel.generate`, its arguments and results."""
        theirs = type(self.target).generate
        bound = inspect.signature(theirs).bind(self.target, *args, **kwargs)
        bound.apply_defaults()
        asked = dict(bound.arguments)
        lm, prompt, length = self.target, asked["prompt"], asked["max_gen_len"]
        names = _unsupported(lm)
        try:
            ours = None if names else self.current()
        except ValueError as error:
            names, ours = [f"this model any more ({error})"], None
        # without a word: what audiocraft refuses, in its own words
        refused = lm.training or (prompt is not None and not self._continues(prompt, length))
        refused |= not asked["conditions"] and lm.transformer.layers[0].cross_attention is not None
        if ours is None or refused:
            warn_unsupported(names)
            return theirs(lm, *args, **kwargs)
        conditions, coefficient = self._conditions(asked)
        beta = asked.get("cfg_coef_beta")
        drawing = {name: asked[name] for name in ("use_sampling", "temp", "top_k", "top_p")}
        with own_precision(ours.device):
            return ours.generate(
                prompt,
                conditions,
                max_gen_len=length,
                cfg_coef=coefficient,
                cfg_coef_beta=beta,
                two_step_cfg=False,
                remove_prompts=asked["remove_prompts"],
                callback=asked["callback"],
                **drawing,
            )

    def _continues(self, prompt: Tensor, length: int) -> bool:
        """Whether tokens [B, K, P] are a prompt that leaves something to generate."""
        codes = prompt.dim() == 3 and prompt.shape[1] == self.target.n_q and prompt.shape[2] < length
        return codes and (prompt.numel() == 0 or (int(prompt.min()) >= 0 and int(prompt.max()) < self.target.card))

    # -- conditions ---------------------------------------------------------------------------------------------------

    def _conditions(self, asked: Mapping[str, Any]) -> tuple[Conditions, float]:
        """Our branches from audiocraft's conditioners, and the coefficient that audiocraft would mix them with."""
        lm, given = self.target, list(asked["conditions"])
        coefficient = lm.cfg_coef if asked["cfg_coef"] is None else asked["cfg_coef"]
        if not given:
            return Conditions(_batch_size(asked), [Branch()], 1), coefficient
        library = sys.modules[_lm_class(lm).__module__]
        null = library.ClassifierFreeGuidanceDropout(p=1.0)(given)
        two_step = lm.two_step_cfg if asked["two_step_cfg"] is None else asked["two_step_cfg"]
        if asked.get("cfg_coef_beta") is not None:
            branches = self._encoded(given + library._drop_description_condition(given) + null, 3)
        elif two_step:
            branches = _quiet_last([*self._encoded(given, 1), *self._encoded(null, 1)])
            coefficient = lm.cfg_coef  # two steps mix with the model's own, whatever was asked for
        else:
            branches = self._encoded(given + null, 2)
        return Conditions(len(given), branches, len(branches)), coefficient

    def _encoded(self, attributes: list[Any], count: int) -> list[Branch]:
        """Attributes of `count` branches in a row, encoded together (the longest text pads all of them)."""
        lm = self.target
        tensors = lm.condition_provider(lm.condition_provider.tokenize(attributes))
        nothing = torch.zeros(len(attributes), 0, lm.dim, device=next(lm.parameters()).device)
        prefix, cross = lm.fuser(nothing, tensors)
        prefixes = prefix.chunk(count) if prefix.shape[1] else [None] * count
        crosses = cross.chunk(count) if cross is not None else [None] * count
        branches = [
            Branch(None if p is None else list(p), None if c is None else list(c))
            for p, c in zip(prefixes, crosses, strict=True)
        ]
        return _quiet_last(branches)


def _quiet_last(branches: list[Branch]) -> list[Branch]:
    """The last branches without what is all zeros: attending to it adds exactly nothing, and costs."""
    for branch in reversed(branches):
        if branch.cross is None or any(bool(row.any()) for row in branch.cross):
            break
        branch.cross = None
    return branches


def _batch_size(asked: Mapping[str, Any]) -> int:
    if asked["num_samples"] is not None:
        return int(asked["num_samples"])
    return 1 if asked["prompt"] is None else len(asked["prompt"])


def _lm_class(lm: Any) -> type:
    return next(c for c in type(lm).__mro__ if c.__name__ == "LMModel")


def _unsupported(lm: Any) -> list[str]:
    names = ["FSDP"] if getattr(lm, "_fsdp", None) is not None else []
    return names + [f"conditions fused by {op!r}" for op in ("sum", "input_interpolate") if lm.fuser.fuse2cond.get(op)]


def _check_architecture(lm: Any) -> None:
    """ValueError for what would be computed differently; options that add weights are noticed by their names."""
    body = lm.transformer
    wanted = {"positional_embedding": "sin", "max_period": 10000, "positional_scale": 1.0, "rope": None}
    found = {name: getattr(body, name, value) for name, value in wanted.items()}
    wrong = [f"{name}={found[name]!r}" for name, value in wanted.items() if found[name] != value]
    if not any(c.__name__ == "LMModel" and type(lm) is c for c in type(lm).__mro__):
        wrong.append(f"a {type(lm).__name__}")
    for layer in body.layers:
        attention = layer.self_attn
        checks = {
            "norm_first=False": layer.norm_first,
            "an activation other than GELU": getattr(layer, "activation", F.gelu) in (F.gelu,),
            "non-causal attention": attention.causal,
            "past_context": attention.past_context is None,
            "kv_repeat": attention.kv_repeat == 1,
        }
        wrong += [what for what, fine in checks.items() if not fine and what not in wrong]
    if wrong:
        raise ValueError(f"the language model has {', '.join(wrong)}, which musicgen_fast does not compute")


_PATTERNS = {
    "DelayedPatternProvider": "delay",
    "ParallelPatternProvider": "parallel",
    "UnrolledPatternProvider": "unroll",
    "CoarseFirstPattern": "coarse_first",
    "MusicLMPattern": "musiclm",
}


def _pattern(provider: Any, num_codebooks: int) -> PatternConfig:
    """The live pattern as a `PatternConfig`; the two tables are compared. ValueError for another one."""
    kind = _PATTERNS.get(type(provider).__name__)
    if kind is None:
        raise ValueError(f"the codebook pattern {type(provider).__name__} is not supported")
    flattened = (
        getattr(provider, "_flattened_codebooks", None) or {}
    )  # of the unrolled pattern: inner step -> codebooks
    options: dict[str, Any] = {"delays": tuple(getattr(provider, "delays", None) or ())}
    if flattened:
        inner = {k: (step, part.delay) for step, part in flattened.items() for k in part.codebooks}
        options["flattening"] = tuple(inner[k][0] for k in range(num_codebooks))
        options["delays"] = tuple(inner[k][1] for k in range(num_codebooks))
    for name in ("flatten_first", "empty_initial", "group_by"):
        if hasattr(provider, name):
            options[name] = getattr(provider, name)
    config = PatternConfig(kind=kind, **options)
    frames = 11
    ours = build_pattern(config, num_codebooks, frames).table.tolist()
    theirs = provider.get_pattern(frames).layout
    table = [[-1] * num_codebooks for _ in theirs]
    for step, cells in enumerate(theirs):
        for cell in cells:
            if cell.t < frames:
                table[step][cell.q] = cell.t
    if ours != table:
        raise ValueError(f"the options of the codebook pattern {type(provider).__name__} are not supported")
    return config
