"""audiocraft's own language model with tiny random weights, and its weights for ours.

    lm = build_lm("text"); codes = generate(lm, texts, "text", seed=3); ours = our_lm(lm, "text")

kinds: text (cross-attention), stereo (8 codebooks), melody (chroma and text prepended), style (a toy waveform
conditioner in the place of MERT; exercises double CFG).
"""

from __future__ import annotations

import random
import types
import warnings
from functools import cache
from importlib.util import find_spec

import pytest
import torch

from . import stubs
from .toy_text import DIM, ToyTokenizer, tiny_t5

needs_audiocraft = pytest.mark.skipif(
    find_spec("audiocraft") is None, reason="audiocraft is not installed; `make test` brings tts-webui-audiocraft"
)
STEREO_DELAYS = [0, 0, 1, 1, 2, 2, 3, 3]


@cache
def load():
    """The audiocraft package, its T5 conditioner pointed at the toy encoder."""
    stubs.install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import audiocraft
        import audiocraft.models.builders
        import audiocraft.modules.conditioners as conditioners
    conditioners.T5Conditioner.MODELS = [*conditioners.T5Conditioner.MODELS, "toy-t5"]
    conditioners.T5Conditioner.MODELS_DIMS = {**conditioners.T5Conditioner.MODELS_DIMS, "toy-t5": DIM}
    conditioners.T5Tokenizer = types.SimpleNamespace(from_pretrained=lambda name, **_: ToyTokenizer())
    conditioners.T5EncoderModel = types.SimpleNamespace(from_pretrained=lambda name, **_: tiny_t5())
    return audiocraft


@cache
def _wav_conditioners():
    import audiocraft.modules.conditioners as conditioners

    class PlainChroma(conditioners.ChromaStemConditioner):
        """The real chroma conditioner on the mix: no demucs."""

        def _get_stemmed_wav(self, wav, sample_rate):
            return wav.mean(1, keepdim=True)

    class ToyStyle(conditioners.WaveformConditioner):
        """Statistics of 1000-sample frames."""

        def __init__(self, output_dim):
            super().__init__(dim=4, output_dim=output_dim, device="cpu")

        def _downsampling_factor(self):
            return 1000

        def _get_wav_embedding(self, x):
            wav = x.wav.mean(1)
            if wav.shape[-1] < 1000:
                return torch.zeros(wav.shape[0], 1, 4)
            frames = wav[:, : wav.shape[-1] // 1000 * 1000].reshape(wav.shape[0], -1, 1000)
            return torch.stack([frames.mean(-1), frames.abs().mean(-1), frames.std(-1), frames.amax(-1)], -1)

    return PlainChroma, ToyStyle


def pattern_provider(kind: str = "delay", num_codebooks: int = 4, **options):
    load()
    import audiocraft.modules.codebooks_patterns as patterns

    providers = {
        "delay": patterns.DelayedPatternProvider,
        "parallel": patterns.ParallelPatternProvider,
        "unroll": patterns.UnrolledPatternProvider,
        "coarse_first": patterns.CoarseFirstPattern,
        "musiclm": patterns.MusicLMPattern,
    }
    return providers[kind](num_codebooks, **options)


def build_lm(kind="text", seed=0, dim=64, num_heads=4, num_layers=3, card=2048, scale=4.0, provider=None):
    """A random LMModel with the released hyper-parameters, sizes aside. `scale` sharpens the logits so that a mistake
    shows in the tokens."""
    load()
    from audiocraft.models.lm import LMModel
    from audiocraft.modules.conditioners import ConditionFuser, ConditioningProvider, T5Conditioner

    torch.manual_seed(seed)
    random.seed(seed)
    n_q = 8 if kind == "stereo" else 4
    provider = provider or pattern_provider(
        "delay", n_q, delays=STEREO_DELAYS if kind == "stereo" else list(range(n_q))
    )
    parts = {"description": T5Conditioner("toy-t5", dim, finetune=False, device="cpu")}
    plain_chroma, toy_style = _wav_conditioners()
    if kind == "melody":
        chroma = plain_chroma(
            output_dim=dim, sample_rate=32000, n_chroma=12, radix2_exp=14, duration=30, match_len_on_eval=True,
            argmax=True, device="cpu",
        )  # fmt: skip
        parts = {"self_wav": chroma, **parts}
    elif kind == "style":
        parts = {"self_wav": toy_style(dim), **parts}
    prefix = kind in ("melody", "style")
    fuser = ConditionFuser(
        {
            "sum": [],
            "prepend": ["self_wav", "description"] if prefix else [],
            "cross": [] if prefix else ["description"],
            "input_interpolate": [],
        }
    )
    lm = LMModel(
        provider, ConditioningProvider(parts, device="cpu"), fuser, n_q=n_q, card=card, dim=dim, num_heads=num_heads,
        hidden_scale=4, norm="layer_norm", norm_first=True, bias_proj=False, weight_init="gaussian",
        depthwise_init="current", zero_bias_init=True, cfg_coef=3.0, num_layers=num_layers, dropout=0.0,
        activation="gelu", bias_ff=False, bias_attn=False, causal=True, custom=False, memory_efficient=True,
        attention_as_float32=False, cross_attention=not prefix, positional_embedding="sin",
    )  # fmt: skip
    with torch.no_grad():
        for module in [*lm.emb, *lm.linears]:
            module.weight.mul_(scale)
        for name, parameter in lm.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return lm.eval()


def waveform(index: int, length: int = 64000) -> torch.Tensor:
    """A tune of 0.8 s notes, none of them the C of silence, and some noise: [1, n] at 32 kHz."""
    generator = torch.Generator().manual_seed(7 + index)
    notes = torch.randint(4, 15, (length // 25600 + 1,), generator=generator)  # semitones above A: C sharp to B
    pitch = (220.0 * 2 ** (notes / 12)).repeat_interleave(25600)[:length]
    phase = (2 * torch.pi * pitch.double() / 32000).cumsum(0)
    return (phase.sin().float() + 0.1 * torch.randn(length, generator=generator))[None]


def conditions(texts, kind: str, lengths=None):
    """audiocraft's ConditioningAttributes, as its MusicGen makes them."""
    from audiocraft.modules.conditioners import ConditioningAttributes, WavCondition

    out = []
    for i, text in enumerate(texts):
        attributes = ConditioningAttributes(text={"description": text})
        wav, length = torch.zeros(1, 1, 1), 0  # text models get a null waveform as well
        if kind in ("melody", "style"):
            wav = waveform(i, lengths[i] if lengths else 64000)[None]
            length = wav.shape[-1]
        attributes.wav["self_wav"] = WavCondition(wav, torch.tensor([length]), sample_rate=[32000], path=[None])
        out.append(attributes)
    return out


@torch.no_grad()
def generate(lm, texts, kind="text", seed=0, steps=24, prompt=None, lengths=None, **options):
    """Tokens [B, K, steps] of audiocraft's own LMModel.generate."""
    attributes = conditions(texts, kind, lengths)
    torch.manual_seed(seed)
    return lm.generate(prompt, attributes, max_gen_len=steps, **options)


def canonical_weights(lm) -> dict[str, torch.Tensor]:
    """audiocraft's state dict under this project's names, written here by hand as a second opinion on the loader."""
    state = {k: v.detach().clone() for k, v in lm.state_dict().items()}
    out = {
        "emb.weight": torch.cat([state[f"emb.{k}.weight"] for k in range(lm.n_q)]),
        "heads.weight": torch.cat([state[f"linears.{k}.weight"] for k in range(lm.n_q)]),
        "norm.weight": state["out_norm.weight"],
        "norm.bias": state["out_norm.bias"],
    }
    description = "condition_provider.conditioners.description.output_proj."
    melody = "condition_provider.conditioners.self_wav.output_proj."
    for part in ("weight", "bias"):
        out[f"text_proj.{part}"] = state[description + part]
        if melody + part in state and _is_chroma(lm):
            out[f"melody_proj.{part}"] = state[melody + part]
    for i in range(len(lm.transformer.layers)):
        theirs, ours = f"transformer.layers.{i}.", f"layers.{i}."
        for part in ("weight", "bias"):
            out[f"{ours}norm1.{part}"] = state[f"{theirs}norm1.{part}"]
            out[f"{ours}norm2.{part}"] = state[f"{theirs}norm2.{part}"]
            if f"{theirs}norm_cross.{part}" in state:
                out[f"{ours}norm_cross.{part}"] = state[f"{theirs}norm_cross.{part}"]
        out[f"{ours}qkv.weight"] = state[f"{theirs}self_attn.in_proj_weight"]
        out[f"{ours}attn_out.weight"] = state[f"{theirs}self_attn.out_proj.weight"]
        out[f"{ours}ffn_in.weight"] = state[f"{theirs}linear1.weight"]
        out[f"{ours}ffn_out.weight"] = state[f"{theirs}linear2.weight"]
        if f"{theirs}cross_attention.in_proj_weight" in state:
            fused = state[f"{theirs}cross_attention.in_proj_weight"]
            out[f"{ours}cross_q.weight"], out[f"{ours}cross_kv.weight"] = fused.split([lm.dim, 2 * lm.dim])
            out[f"{ours}cross_out.weight"] = state[f"{theirs}cross_attention.out_proj.weight"]
    return out


def _is_chroma(lm) -> bool:
    return "chroma" in type(lm.condition_provider.conditioners["self_wav"]).__name__.lower()


def build_musicgen(kind="text", seed=0, max_duration=30, **sizes):
    """A whole audiocraft MusicGen with its debug codec: 25 frames a second, 400 codes; stereo is interleaved."""
    load()
    from audiocraft.models import builders
    from audiocraft.models.encodec import InterleaveStereoCompressionModel
    from audiocraft.models.musicgen import MusicGen

    torch.manual_seed(seed)
    codec = builders.get_debug_compression_model("cpu", sample_rate=32000)
    if kind == "stereo":
        codec = InterleaveStereoCompressionModel(codec)
    return MusicGen("oracle", codec, build_lm(kind, seed=seed, card=400, **sizes), max_duration=max_duration)
