"""Put the demo model together: `python -m examples.demo_model.ship CODEC LM OUT`, one folder for both libraries.

CODEC is a folder of `train_codec`, LM one of `train_lm` (lm.pt and spiece.model). OUT becomes what transformers'
`MusicgenForConditionalGeneration.from_pretrained` and musicgen_fast's `MusicGen.get_pretrained` load: float16 weights,
configuration, tokenizer. Then it is loaded in both, tokens and sound of a few prompts are compared, greedy and sampled,
and the command fails where they differ or the folder is too large. It trains nothing and knows no songs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musicgen_fast.checkpoints.transformers import names_in_file
from musicgen_fast.checkpoints.write import generation_config

from .lm import SECONDS, Sizes
from .text import write_tokenizer

LIMIT = 16_000_000  # bytes, all files together
PROMPTS = (
    "a fast happy chiptune with a square wave and rock drums",
    "slow, sad, a flute, no drums, quiet",
    "A Dance Beat with bells, in minor, 125 bpm",
)
_GUIDANCE, _TOP_K = 3.0, 250


@dataclass(frozen=True)
class Agreement:
    """What the two libraries made of the same prompts.

    Attributes:
        tokens: share of equal tokens, 1.0 where all are.
        sound: largest difference of the waveforms relative to the largest sample (only of equal tokens a fair figure).
        distinct: different tokens among them; a handful would show nothing.
    """

    tokens: float
    sound: float
    distinct: int


def assemble(codec_folder: Path, lm_folder: Path) -> Any:
    """transformers' MusicgenForConditionalGeneration of the trained parts, float32."""
    import transformers as tf

    codec = tf.EncodecModel.from_pretrained(codec_folder, dtype=torch.float32)
    parts = torch.load(lm_folder / "lm.pt", weights_only=True)
    sizes = Sizes(**parts["sizes"])
    config = sizes.model()
    if codec.config.num_quantizers != sizes.books or codec.config.codebook_size != sizes.codes:
        found = f"{codec.config.num_quantizers} x {codec.config.codebook_size}"
        raise ValueError(f"{codec_folder} has {found} codes, the language model {sizes.books} x {sizes.codes}")
    special = dict.fromkeys(("bos_token_id", "pad_token_id"), config.special_token)
    decoder = tf.MusicgenDecoderConfig(
        vocab_size=config.vocab_size, hidden_size=config.dim, num_hidden_layers=config.num_layers, dropout=0.0,
        num_attention_heads=config.num_heads, ffn_dim=config.ffn_dim, num_codebooks=config.num_codebooks, **special,
    )  # fmt: skip
    model = tf.MusicgenForConditionalGeneration(
        tf.MusicgenConfig(text_encoder=sizes.text(), audio_encoder=codec.config, decoder=decoder)
    )
    state = {f"audio_encoder.{name}": tensor for name, tensor in codec.state_dict().items()}
    state |= {f"text_encoder.{name}": tensor for name, tensor in parts["text"].items()}
    for name, theirs in names_in_file(config):
        state |= dict(zip(theirs, parts["transformer"][name].chunk(len(theirs)), strict=True))
    model.load_state_dict(state, strict=True)
    model.generation_config = tf.GenerationConfig(**{**generation_config(config), "max_length": round(50 * SECONDS)})
    return model.eval()


def write(model: Any, vocabulary: bytes, out: Path) -> int:
    """The folder: model.safetensors in float16 and everything else that either library reads. Bytes in all.

    config.json says float32: that is what transformers then computes in, as musicgen_fast does on a CPU. In half
    precision near-ties would make other tokens.
    """
    from transformers import EncodecFeatureExtractor

    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    if lost := [name for name, tensor in half.items() if not tensor.isfinite().all()]:
        raise ValueError(f"not finite in float16: {', '.join(lost[:3])}")
    model.save_pretrained(out, state_dict=half)
    (out / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner only
    path = out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(_cleaned(config) | {"segment_duration": SECONDS}, indent=2) + "\n", encoding="utf-8")
    # The processor is a tokenizer and a feature extractor, which from_pretrained finds by these two files.
    EncodecFeatureExtractor(1, model.config.audio_encoder.sampling_rate, padding_side="left").save_pretrained(out)
    write_tokenizer(out, vocabulary)
    return sum(file.stat().st_size for file in out.iterdir())


def _cleaned(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration and its sections: every "dtype" float32, and no folder of this machine."""
    inner = {key: _cleaned(value) if isinstance(value, dict) else value for key, value in config.items()}
    inner.pop("_name_or_path", None)
    return {**inner, **({"dtype": "float32"} if "dtype" in inner else {})}


def compare(folder: Path, frames: int = 150, *, seed: int | None = None, prompts: Sequence[str] = PROMPTS) -> Agreement:
    """Generation of `frames` frames by both libraries from what lies in the folder: greedy, or sampled from torch's
    generator under `seed`. Guidance 3."""
    theirs, their_wav = _transformers(folder, prompts, frames, seed)
    ours, our_wav = _musicgen_fast(folder, prompts, frames, seed)
    if ours.shape != theirs.shape or our_wav.shape != their_wav.shape:
        raise RuntimeError(f"shapes differ: {list(ours.shape)} here, {list(theirs.shape)} from transformers")
    sound = float((our_wav - their_wav).abs().max() / their_wav.abs().max().clamp(min=1e-9))
    return Agreement(float((ours == theirs).double().mean()), sound, len(ours.unique()))


def _transformers(folder: Path, prompts: Sequence[str], frames: int, seed: int | None) -> tuple[Tensor, Tensor]:
    """Tokens [B, K, frames], caught where they enter the codec, and sound [B, 1, n]."""
    from transformers import MusicgenForConditionalGeneration, T5Tokenizer

    model: Any = MusicgenForConditionalGeneration.from_pretrained(folder)
    inputs = T5Tokenizer.from_pretrained(folder)(list(prompts), padding=True, return_tensors="pt")
    caught: list[Tensor] = []
    decode = model.audio_encoder.decode

    def catching(codes: Tensor, *args: Any, **options: Any) -> Any:
        caught.append(codes[0].clone())
        return decode(codes, *args, **options)

    model.audio_encoder.decode = catching
    steps = frames + model.config.decoder.num_codebooks - 1  # the last codebook comes that much later
    draw = {"do_sample": False} if seed is None else {"do_sample": True, "top_k": _TOP_K}
    torch.manual_seed(seed or 0)
    wav = model.generate(**inputs, guidance_scale=_GUIDANCE, max_new_tokens=steps, **draw)
    (codes,) = caught
    return codes, wav


def _musicgen_fast(folder: Path, prompts: Sequence[str], frames: int, seed: int | None) -> tuple[Tensor, Tensor]:
    from musicgen_fast import MusicGen

    model: Any = MusicGen.get_pretrained(folder, device="cpu")
    seconds = (frames + 0.25) / model.frame_rate  # a quarter of a frame more, so that rounding cannot lose one
    model.set_generation_params(use_sampling=seed is not None, top_k=_TOP_K, duration=seconds, cfg_coef=_GUIDANCE)
    torch.manual_seed(seed or 0)
    wav, tokens = model.generate(list(prompts), return_tokens=True)
    return tokens, wav


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 1 where the folder is too large or the libraries disagree."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo_model.ship", description="Put the demo model together and check it."
    )
    parser.add_argument("codec", type=Path, help="the codec that the tokens were made with")
    parser.add_argument("lm", type=Path, help="folder with lm.pt and spiece.model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--frames", type=int, default=150, help="to compare, of 20 ms (default 150)")
    args = parser.parse_args(argv)
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty")
    size = write(assemble(args.codec, args.lm), (args.lm / "spiece.model").read_bytes(), args.out)
    for file in sorted(args.out.iterdir()):
        print(f"{file.stat().st_size:10d}  {file.name}")
    print(f"{size:10d}  bytes in all, {LIMIT} allowed")
    equal = True
    for name, seed in (("greedy", None), ("sampled", 0)):
        found = compare(args.out, args.frames, seed=seed)
        equal = equal and found.tokens == 1.0
        print(f"{name}: {100 * found.tokens:.2f} % of the two libraries' tokens are equal ({found.distinct} different)")
        print(f"  largest difference of the sound, relative to its largest sample: {found.sound:.1e}")
    return 0 if size <= LIMIT and equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
