"""This project's language model around the weights of a reference model."""

from __future__ import annotations

import torch

from musicgen_fast.conditioning import Conditioner, ConditioningAttributes, WavCondition
from musicgen_fast.config import MelodyConfig, ModelConfig, PatternConfig, StyleConfig, TextConfig
from musicgen_fast.lm import LMModel
from musicgen_fast.model import Transformer
from musicgen_fast.state import Branch, Conditions

from . import audiocraft_lm as ac
from .toy_text import DIM, ToyTokenizer, tiny_t5


class ToyTextEncoder:
    """The toy T5 as this project calls a text encoder."""

    dim = DIM

    def __init__(self):
        self.tokenizer, self.t5 = ToyTokenizer(), tiny_t5()

    @torch.no_grad()
    def encode(self, text: str | None):
        if not text:
            return None
        return self.t5(input_ids=torch.tensor([self.tokenizer.ids(text)])).last_hidden_state[0]


class ToyStyle:
    """The oracle's toy style conditioner as this project calls a `StyleConditioner`: 32 tokens a second."""

    ds_factor = 1

    def __init__(self, theirs):
        self.output_proj = theirs.condition_provider.conditioners["self_wav"].output_proj

    def draw_start(self, wav, sample_rate, seed=None):
        return 0

    @torch.no_grad()
    def __call__(self, wav, sample_rate, *, start=None, seed=None):
        frames = wav.mean(0)[: wav.shape[-1] // 1000 * 1000].reshape(-1, 1000)
        features = torch.stack([frames.mean(-1), frames.abs().mean(-1), frames.std(-1), frames.amax(-1)], -1)
        return self.output_proj(features)


def config_of(lm, kind: str, pattern: PatternConfig | None = None) -> ModelConfig:
    prefix = kind in ("melody", "style")
    delays = tuple(ac.STEREO_DELAYS) if kind == "stereo" else tuple(range(lm.n_q))
    return ModelConfig(
        dim=lm.dim,
        num_layers=len(lm.transformer.layers),
        num_heads=lm.transformer.layers[0].self_attn.num_heads,
        ffn_dim=4 * lm.dim,
        num_codebooks=lm.n_q,
        vocab_size=lm.card,
        pattern=pattern or PatternConfig(delays=delays),
        conditioning="prefix" if prefix else "cross",
        text=TextConfig("toy", DIM),
        melody=MelodyConfig() if kind == "melody" else None,
        style=StyleConfig(feature_hop=750, ds_factor=1) if kind == "style" else None,
        audio_channels=2 if kind == "stereo" else 1,
    )


def lm_of(theirs, kind: str, pattern: PatternConfig | None = None) -> LMModel:
    transformer = Transformer.from_weights(config_of(theirs, kind, pattern), ac.canonical_weights(theirs))
    style = ToyStyle(theirs) if kind == "style" else None
    return LMModel(transformer, Conditioner(transformer.config, transformer, ToyTextEncoder(), style))


def attributes(texts, kind: str, lengths=None) -> list[ConditioningAttributes]:
    out = []
    for i, text in enumerate(texts):
        request = ConditioningAttributes(text={"description": text}, separate=False)
        if kind in ("melody", "style"):
            wav = ac.waveform(i, lengths[i] if lengths else 64000)[None]
            request.wav["self_wav"] = WavCondition(wav, torch.tensor([wav.shape[-1]]), [32000], [None])
        out.append(request)
    return out


def generate(lm: LMModel, texts, kind="text", seed=0, steps=24, prompt=None, lengths=None, **options):
    torch.manual_seed(seed)
    return lm.generate(prompt, attributes(texts, kind, lengths), max_gen_len=steps, **options)


def injected_conditions(theirs, texts, *, double: bool) -> Conditions:
    """audiocraft's own condition tensors of a style model (wav, then text, prepended) as our `Conditions`."""
    from audiocraft.models.lm import _drop_description_condition
    from audiocraft.modules.conditioners import ClassifierFreeGuidanceDropout

    asked = ac.conditions(texts, "style")
    null = ClassifierFreeGuidanceDropout(p=1.0)(asked)
    middle = _drop_description_condition(asked) if double else []
    provider = theirs.condition_provider
    with torch.no_grad():
        tensors = provider(provider.tokenize(asked + middle + null))
    rows = torch.cat([tensors["self_wav"][0], tensors["description"][0]], dim=1)
    count = len(texts)
    branches = [Branch(prefix=list(part)) for part in rows.split(count)]
    return Conditions(count, branches, len(branches))
