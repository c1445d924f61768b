"""Checkpoints made by transformers and audiocraft themselves load, and what we write loads there."""

from __future__ import annotations

import pytest
import torch

from musicgen_fast.checkpoints import load_checkpoint
from musicgen_fast.checkpoints.write import write_transformers_folder
from musicgen_fast.codec import EnCodec
from musicgen_fast.config import TextConfig
from musicgen_fast.model import Transformer

from .checkpoint_writers import KINDS, assert_same, tiny, write_audiocraft
from .oracle import audiocraft_lm as ac


def transformers_model(kind: str, d: int = 32, text_dim: int = 24, **encodec):
    """A random model of transformers' own making."""
    import transformers as hf

    melody, books = "melody" in kind, 8 if "stereo" in kind else 4
    decoder_class = hf.MusicgenMelodyDecoderConfig if melody else hf.MusicgenDecoderConfig
    config_class = hf.MusicgenMelodyConfig if melody else hf.MusicgenConfig
    model_class = hf.MusicgenMelodyForConditionalGeneration if melody else hf.MusicgenForConditionalGeneration
    torch.manual_seed(0)
    text = hf.T5Config(vocab_size=160, d_model=text_dim, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    codec = hf.EncodecConfig(
        sampling_rate=32000, num_filters=4, hidden_size=16, codebook_size=64, target_bandwidths=[1.2],
        upsampling_ratios=[8, 5, 4, 4], use_causal_conv=False, use_conv_shortcut=False, num_lstm_layers=1, **encodec,
    )  # fmt: skip
    decoder = decoder_class(
        vocab_size=64, hidden_size=d, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, num_codebooks=books,
        audio_channels=2 if "stereo" in kind else 1, pad_token_id=64, bos_token_id=64,
    )  # fmt: skip
    model = model_class(config_class(text_encoder=text, audio_encoder=codec, decoder=decoder))
    return model.eval()


@pytest.mark.parametrize("kind", ["text", "stereo", "melody"])
@torch.no_grad()
def test_models_saved_by_transformers(tmp_path, kind):
    """Same logits from its decoder and from ours around the loaded weights."""
    theirs = transformers_model(kind)
    theirs.save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert loaded.text.tokenizer_folder is None
    config = loaded.config
    ours = Transformer.from_weights(config, loaded.lm)
    torch.manual_seed(1)
    tokens = torch.randint(0, 65, (1, config.num_codebooks, 9))
    states = torch.randn(1, 5, 24)
    projected = ours.text_proj(states)
    torch.testing.assert_close(projected, theirs.enc_to_dec_proj(states))
    key = {"prefix": "prefix"}.get(config.conditioning, "cross")
    if config.melody is not None:
        chroma = torch.randn(1, 7, 12)
        torch.testing.assert_close(ours.melody_proj(chroma), theirs.audio_enc_to_dec_proj(chroma))
        projected = torch.cat([ours.melody_proj(chroma), projected], dim=1)
    mine = ours(tokens, **{key: projected})  # [1, S, K, V]
    expected = theirs.decoder(tokens[0], encoder_hidden_states=projected).logits  # [K, S (+ prefix), V]
    torch.testing.assert_close(mine[0].transpose(0, 1), expected[:, -9:], rtol=1e-4, atol=1e-5)


def test_text_encoder_saved_by_transformers(tmp_path):
    from transformers import T5Config, T5EncoderModel

    theirs = transformers_model("text")
    theirs.save_pretrained(tmp_path)
    text = load_checkpoint(tmp_path).text
    encoder = T5EncoderModel(T5Config(**text.config)).eval()
    report = encoder.load_state_dict(text.tensors, strict=False)
    assert set(report.missing_keys) <= {"encoder.embed_tokens.weight"} and not report.unexpected_keys
    ids = torch.tensor([[5, 9, 30, 1]])
    with torch.no_grad():
        expected = theirs.text_encoder(ids).last_hidden_state
        torch.testing.assert_close(encoder(ids).last_hidden_state, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_we_write(tmp_path, kind):
    import transformers as hf

    name = "MusicgenMelodyForConditionalGeneration" if "melody" in kind else "MusicgenForConditionalGeneration"
    write_transformers_folder(tmp_path, checkpoint=tiny(kind))
    model, report = getattr(hf, name).from_pretrained(tmp_path, output_loading_info=True)
    left_over = {key for key in report["missing_keys"] if not key.endswith("embed_tokens.weight")}
    # the codec's training buffers are not written; transformers makes them anew
    assert not [key for key in left_over if ".codebook." not in key]
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert model.generation_config.guidance_scale == 3.0
    loaded = load_checkpoint(tmp_path)
    codec = EnCodec(loaded.codec_config)
    codec.load_state_dict(loaded.codec)
    codes = torch.randint(0, 64, (1, 4, 20))
    with torch.no_grad():
        expected = model.audio_encoder.decode(codes[None], [None]).audio_values
    torch.testing.assert_close(codec.decode(codes), expected, rtol=1e-4, atol=1e-5)


@ac.needs_audiocraft
@pytest.mark.parametrize("kind", ["text", "stereo", "melody"])
def test_models_exported_by_audiocraft(tmp_path, kind):
    """audiocraft builds the model from a configuration and exports a training checkpoint; the loader reads that."""
    audiocraft = ac.load()
    from audiocraft.utils.export import export_lm, export_pretrained_compression_model
    from omegaconf import OmegaConf

    from .checkpoint_writers import edited, xp_cfg

    written = tiny(kind, text=TextConfig(name="toy-t5", dim=24))
    write_audiocraft(tmp_path, written, codec="pointer")
    changes = {
        "device": "cpu",
        "dtype": "float32",
        "conditioners.args": ...,
        "conditioners.self_wav.chroma_stem.cache_path": None,
    }
    if kind != "melody":
        changes.pop("conditioners.self_wav.chroma_stem.cache_path")
    cfg = OmegaConf.create(edited(xp_cfg(written), changes))
    torch.manual_seed(0)
    lm = audiocraft.models.builders.get_lm_model(cfg)
    training = {"best_state": {"model": lm.state_dict()}, "fsdp_best_state": {}, "xp.cfg": cfg}
    torch.save(training, tmp_path / "checkpoint.th")
    load = torch.load
    with pytest.MonkeyPatch.context() as patch:  # the exporter predates weights_only
        patch.setattr(torch, "load", lambda path, where: load(path, where, weights_only=False))
        export_lm(tmp_path / "checkpoint.th", tmp_path / "state_dict.bin")
    export_pretrained_compression_model("facebook/encodec_32khz", tmp_path / "compression_state_dict.bin")
    loaded = load_checkpoint(tmp_path)
    assert_same(loaded.lm, ac.canonical_weights(lm))
    assert loaded.config == written.config
