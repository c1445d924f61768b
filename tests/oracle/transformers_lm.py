"""transformers' MusicGen and MusicGen Melody with tiny random weights, as folders that both packages load.

    theirs = build("text"); save(theirs, folder); tokens, wav = generate(theirs, tokenizer(folder), texts, frames=16)

kinds: text (cross-attention), stereo (8 codebooks), melody (chroma and text prepended), stereo-melody. The codec is
part of the model: tokens are taken where they enter it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musicgen_fast.checkpoints.write import write_vocabulary

RATE, HOP = 32000, 640
_T5_VOCAB = 96  # above the 80 pieces of the vocabulary that `save` writes


def build(kind="text", seed=0, dim=64, heads=4, layers=3, vocab=64, text_dim=24):
    """A model of one of transformers' two classes; the global random state is left as it was.

    Weights are drawn wide (variance 1 / fan-in; embeddings and heads 4 times that deviation, norms off 1 and 0): every
    part moves the logits, and a mistake in any shows in the tokens.
    """
    import transformers as tf

    model: Any
    melody, channels = "melody" in kind, 2 if "stereo" in kind else 1
    text = tf.T5Config(vocab_size=_T5_VOCAB, d_model=text_dim, d_kv=8, d_ff=48, num_layers=2, num_heads=3)
    decoder = (tf.MusicgenMelodyDecoderConfig if melody else tf.MusicgenDecoderConfig)(
        vocab_size=vocab,
        hidden_size=dim,
        num_hidden_layers=layers,
        ffn_dim=2 * dim,
        num_attention_heads=heads,
        num_codebooks=4 * channels,
        audio_channels=channels,
        pad_token_id=vocab,
        bos_token_id=vocab,
    )
    parts = {"text_encoder": text, "audio_encoder": _codec_config(vocab), "decoder": decoder}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if melody:
            model = tf.MusicgenMelodyForConditionalGeneration(tf.MusicgenMelodyConfig(**parts))
        else:
            model = tf.MusicgenForConditionalGeneration(tf.MusicgenConfig(**parts))
        _widen(model)
    settings = model.generation_config
    settings.bos_token_id = settings.pad_token_id = settings.decoder_start_token_id = vocab
    return model.eval().requires_grad_(False)


def _codec_config(vocab: int):
    """The 32 kHz codec at the smallest size; transformers counts codebooks by kilobits a second."""
    from transformers import EncodecConfig

    bits = 4 * 50 * math.ceil(math.log2(vocab))
    return EncodecConfig(
        sampling_rate=RATE,
        target_bandwidths=[(bits + 0.5) / 1000],
        codebook_size=vocab,
        hidden_size=16,
        num_filters=4,
        num_lstm_layers=1,
        upsampling_ratios=[8, 5, 4, 4],
        use_causal_conv=False,
        use_conv_shortcut=False,
    )


@torch.no_grad()
def _widen(model) -> None:
    for name, parameter in model.named_parameters():
        if name.startswith("text_encoder."):
            continue
        if name.startswith("audio_encoder."):  # as drawn, biases drown what goes in: small ones, and louder weights
            parameter.mul_(0.1 if "bias" in name else 2.0 if "original0" in name else 1.0)
        elif parameter.dim() < 2:
            parameter.add_(0.1 * torch.randn_like(parameter))
        else:
            scale = 4.0 if "embed_tokens" in name or "lm_heads" in name else 1.0
            parameter.normal_(std=scale / math.sqrt(parameter.shape[1]))
    for layer in model.audio_encoder.quantizer.layers:
        layer.codebook.embed.normal_(std=0.3)  # about as large as the latents, so that sounds get many different codes


def save(model, folder: Path) -> Path:
    """What `save_pretrained` writes, and a vocabulary for T5."""
    model.save_pretrained(folder)
    write_vocabulary(folder)
    return folder


def tokenizer(folder: Path):
    from transformers import T5Tokenizer

    return T5Tokenizer.from_pretrained(str(folder))


def generate(
    model,
    tokenize,
    texts: Sequence[str | None],
    frames: int,
    *,
    seed: int = 0,
    sampling: bool = True,
    top_k: int = 50,
    temperature: float = 1.0,
    guidance: float = 3.0,
    melodies: Tensor | None = None,
    prompt: Tensor | None = None,
    recording: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(tokens [B, K, frames], wav [B, C, frames * 640]) of the model's own `generate`.

    Args:
        melodies: [B, n] at 32 kHz, melody models only.
        prompt: tokens [B, K, P] to continue.
        recording: waveforms [B, C, n] at 32 kHz to continue, encoded by the model's own codec.
    """
    inputs = dict(tokenize([text or "" for text in texts], padding=True, return_tensors="pt"))
    inputs["attention_mask"] = inputs["attention_mask"] * torch.tensor([[1 if text else 0] for text in texts])
    known = 0
    if melodies is not None:
        inputs["input_features"] = chroma(melodies)
    if prompt is not None:
        inputs["decoder_input_ids"], known = prompt.flatten(0, 1), prompt.shape[2]
    if recording is not None:
        inputs["input_values"], known = recording, -(-recording.shape[2] // HOP)
    torch.manual_seed(seed)
    draw = {"do_sample": True, "top_k": top_k, "temperature": temperature} if sampling else {"do_sample": False}
    with _tapped(model.audio_encoder) as codes:
        wav = model.generate(**inputs, max_new_tokens=frames - known + 3, guidance_scale=guidance, **draw)
    return (torch.stack(codes, 2).flatten(1, 2) if len(codes) == 2 else codes[0]), wav


@contextmanager
def _tapped(codec) -> Iterator[list[Tensor]]:
    """The codes [B, K, T] of every call of the codec's `decode`: one, or the left and the right side."""
    seen: list[Tensor] = []
    decode = codec.decode

    def tapped(codes, *args, **options):
        seen.append(codes[0].clone())
        return decode(codes, *args, **options)

    codec.decode = tapped
    try:
        yield seen
    finally:
        del codec.decode


def chroma(wavs: Tensor) -> Tensor:
    """[B, n] at 32 kHz -> one-hot chroma [B, frames, 12]: transformers' feature extractor, which wants torchaudio."""
    from transformers.audio_utils import chroma_filter_bank

    size = 16384
    bank = torch.from_numpy(chroma_filter_bank(size, num_chroma=12, sampling_rate=RATE, tuning=0)).float()
    window = torch.hann_window(size)
    spectrum = torch.stft(wavs, size, size // 4, window=window, center=True, return_complex=True)
    power = spectrum.abs().pow(2) / window.pow(2).sum()
    return torch.nn.functional.one_hot((bank @ power).argmax(1), 12).float()


def tune(index: int, seconds: float = 2.0) -> Tensor:
    """A melody [n] at 32 kHz: a random note every quarter of a second, a little noise."""
    generator = torch.Generator().manual_seed(31 + index)
    notes = torch.randint(0, 24, (math.ceil(4 * seconds),), generator=generator)
    hertz = (220 * 2 ** (notes / 12)).repeat_interleave(RATE // 4)[: int(seconds * RATE)]
    phase = 2 * torch.pi * torch.cumsum(hertz.double() / RATE, 0)
    return torch.sin(phase).float() * 0.5 + 0.02 * torch.randn(len(hertz), generator=generator)
