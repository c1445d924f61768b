"""Style tokens against audiocraft's StyleConditioner, and reading MERT, for which a tiny random HuBERT stands in."""

from __future__ import annotations

import json
import math
import pickle
import random
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from musicgen_fast.audio import convert_audio
from musicgen_fast.conditioning.style import StyleConditioner, excerpt_start, load_mert
from musicgen_fast.config import StyleConfig
from musicgen_fast.errors import CheckpointError

from .oracle import audiocraft_lm as ac

# audiocraft's scale "xsmall"; MERT's strides and its width 768, which audiocraft fixes
CONFIG = StyleConfig(dim=256, num_heads=8, num_layers=4, ffn_dim=1024, num_codebooks=4, codebook_size=64)
WIDTH = 48
RATE = CONFIG.sample_rate


def _tiny_hubert(seed: int = 0, **changes):
    from transformers import HubertConfig, HubertModel

    torch.manual_seed(seed)
    sizes = dict(hidden_size=768, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, conv_dim=(8,) * 7)
    return HubertModel(HubertConfig(**sizes, **changes)).eval()


@pytest.fixture(scope="module")
def mert():
    return _tiny_hubert()


@pytest.fixture(scope="module")
def theirs(mert):
    """audiocraft's conditioner around the tiny HuBERT, with codebooks and statistics as after training."""
    if find_spec("audiocraft") is None:
        pytest.skip("audiocraft is not installed; `make test` brings tts-webui-audiocraft")
    ac.load()
    import transformers
    from audiocraft.modules.conditioners import StyleConditioner as Theirs

    torch.manual_seed(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers, "AutoModel", SimpleNamespace(from_pretrained=lambda *_, **__: mert))
        conditioner = Theirs(
            transformer_scale="xsmall", n_q_out=CONFIG.num_codebooks, bins=CONFIG.codebook_size, model_name="mert",
            sample_rate=RATE, encodec_checkpoint="", length=3.0, output_dim=WIDTH, device="cpu",
        ).eval()  # fmt: skip
    conditioner.batch_norm.running_mean.normal_(std=0.3)
    conditioner.batch_norm.running_var.uniform_(0.5, 2.0)
    for layer in conditioner.rvq.vq.layers:
        layer._codebook.embed.normal_()
        layer._codebook.inited.fill_(1)
    for parameter in conditioner.transformer.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return conditioner


@pytest.fixture
def pair(theirs, mert):
    """(audiocraft's, ours) with the same weights."""
    theirs.set_params()
    theirs.ds_factor = 15
    return theirs, StyleConditioner.from_weights(CONFIG, WIDTH, theirs.state_dict(), mert)


def _wav(seconds: float = 5.0, channels: int = 1, seed: int = 0) -> torch.Tensor:
    """[C, T] at 32 kHz: a sweep and noise, so that every excerpt differs."""
    generator = torch.Generator().manual_seed(seed)
    samples = int(seconds * RATE)
    sweep = torch.sin(torch.linspace(20, 700, samples).cumsum(0) / 300)
    return 0.3 * sweep + 0.2 * torch.randn(channels, samples, generator=generator)


@torch.no_grad()
def _expected(conditioner, wav: torch.Tensor) -> torch.Tensor:
    from audiocraft.modules.conditioners import WavCondition

    mono = wav.mean(0, keepdim=True)[None]
    length = 0 if wav.shape[-1] == 1 else wav.shape[-1]
    return conditioner(WavCondition(mono, torch.tensor([length]), [RATE], [None], [None]))[0][0]


# -- the tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "count"),
    [
        ({}, 15),
        ({"eval_q": 1}, 15),
        ({"eval_q": 4, "excerpt_length": 1.5}, 8),
        ({"eval_q": 2, "excerpt_length": 4.5, "ds_factor": 7}, 49),
    ],
)
def test_tokens_equal_audiocrafts(pair, params, count):
    reference, ours = pair
    reference.set_params(**params)
    ours.set_params(**params)
    for seed in range(3):
        wav = _wav(channels=seed % 2 + 1, seed=seed)
        random.seed(seed)
        expected = _expected(reference, wav)
        state = random.getstate()
        random.seed(seed)
        actual = ours(wav, RATE)
        assert random.getstate() == state  # one draw, like theirs
        assert actual.shape == (count, WIDTH) and actual.dtype == torch.float32 and not actual.requires_grad
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(actual[0], actual[1])


def test_the_quantiser_picks_the_same_entries(pair):
    """Equal tokens could hide a swapped near-tie; equal sums of codebook entries cannot."""
    reference, ours = pair
    with torch.no_grad():
        x = torch.randn(300, CONFIG.dim)
        reference.rvq.set_num_codebooks(3)
        assert torch.equal(ours._quantised(x), reference.rvq(x.T[None], frame_rate=1.0).x[0].T)


def test_an_independent_computation(mert):
    """The whole path in the plainest words, from the configuration alone."""
    torch.manual_seed(3)
    config = StyleConfig(dim=16, num_heads=2, num_layers=2, ffn_dim=24, num_codebooks=3, codebook_size=9, eval_q=2)
    ours = StyleConditioner(config, 5, mert)
    for name, tensor in ours.state_dict().items():
        tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else 0.3 * torch.randn_like(tensor))
    w = {name: tensor.double() for name, tensor in ours.state_dict().items()}
    x = torch.randn(20, 768)
    actual = ours.tokens(x)

    h = x.double() @ w["embed.weight"].T + w["embed.bias"]
    for t in range(20):
        for i in range(8):
            angle = t / 10000 ** (i / 7)
            h[t, i] += math.cos(angle)
            h[t, 8 + i] += math.sin(angle)
    for n in range(2):
        p = f"transformer.layers.{n}."
        norm = torch.nn.functional.layer_norm(h, (16,), w[p + "norm1.weight"], w[p + "norm1.bias"])
        q, k, v = (norm @ part.T for part in w[p + "self_attn.in_proj_weight"].chunk(3))
        heads = [((q[:, s] @ k[:, s].T) / 8**0.5).softmax(-1) @ v[:, s] for s in (slice(0, 8), slice(8, 16))]
        h = h + torch.cat(heads, 1) @ w[p + "self_attn.out_proj.weight"].T
        norm = torch.nn.functional.layer_norm(h, (16,), w[p + "norm2.weight"], w[p + "norm2.bias"])
        inner = norm @ w[p + "linear1.weight"].T
        h = h + (inner * 0.5 * (1 + torch.erf(inner / 2**0.5))) @ w[p + "linear2.weight"].T
    h = (h - w["batch_norm.running_mean"]) / (w["batch_norm.running_var"] + 1e-5).sqrt()
    rows = []
    for row in h[::15]:
        total = torch.zeros(16, dtype=torch.float64)
        for n in range(2):
            book = w[f"rvq.vq.layers.{n}._codebook.embed"]
            total = total + min(book, key=lambda entry, rest=row - total: (rest - entry).square().sum())
        rows.append(total @ w["output_proj.weight"].T + w["output_proj.bias"])
    torch.testing.assert_close(actual.double(), torch.stack(rows), rtol=1e-5, atol=1e-5)


def test_no_audio_is_one_zero_token(pair):
    reference, ours = pair
    assert torch.equal(_expected(reference, torch.zeros(1, 1)), torch.zeros(1, WIDTH))
    state = random.getstate()
    assert torch.equal(ours(None, RATE), torch.zeros(1, WIDTH))
    assert torch.equal(ours(torch.ones(1, 1), RATE), torch.zeros(1, WIDTH))
    assert ours.draw_start(None, RATE) == 0 and random.getstate() == state


# -- the excerpt ----------------------------------------------------------------------------------------------------


def test_the_start_of_the_excerpt(pair):
    _, ours = pair
    wav = _wav()
    state = random.getstate()
    start = ours.draw_start(wav, RATE, seed=11)
    assert start == random.Random(11).randint(0, 2 * RATE) == excerpt_start(5 * RATE, 3 * RATE, 11)
    expected = ours(wav, RATE, start=start)
    assert torch.equal(ours(wav, RATE, seed=11), expected)
    assert torch.equal(ours(wav[:, start : start + 3 * RATE], RATE, start=0), expected)
    assert not torch.equal(ours(wav, RATE, seed=12), expected)
    ours(wav[:, : 3 * RATE], RATE, seed=1)
    assert random.getstate() == state, "seeded draws leave the global generator alone"
    assert {excerpt_start(4, 3, seed) for seed in range(40)} == {0, 1}
    for wrong in (-1, 2 * RATE + 1):
        with pytest.raises(ValueError, match=f"no excerpt of 3 s starts at sample {wrong}"):
            ours(wav, RATE, start=wrong)


def test_other_rates_count_in_the_models(pair):
    _, ours = pair
    wav = _wav(4.0, channels=2)[:, : 4 * 16000]  # 4 s at 16 kHz
    assert 0 <= ours.draw_start(wav, 16000, seed=0) <= RATE
    assert ours(wav, 16000, start=RATE).shape == (15, WIDTH)
    with pytest.raises(ValueError, match="no excerpt"):
        ours(wav, 16000, start=RATE + 1)


def test_the_middle_where_the_model_takes_it(mert):
    ours = StyleConditioner(StyleConfig(**{**_fields(CONFIG), "use_middle": True}), WIDTH, mert)
    assert ours.draw_start(_wav(), RATE) == ours.draw_start(_wav(), RATE, seed=1) == RATE


def _fields(config: StyleConfig) -> dict:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_audio_that_is_too_short(pair):
    _, ours = pair
    for call in (ours.draw_start, ours):
        with pytest.raises(ValueError, match=r"lasts 2 s but must last at least 3 s.*excerpt_length"):
            call(_wav(2.0), RATE)
    ours.set_params(excerpt_length=2.0)
    assert ours(_wav(2.0), RATE).shape == (10, WIDTH)
    with pytest.raises(ValueError, match=r"\[channels, samples\]"):
        ours(torch.zeros(RATE), RATE)
    with pytest.raises(ValueError, match="NaN"):
        ours(torch.full((1, 3 * RATE), float("nan")), RATE)


def test_set_params_goes_back_to_defaults_except_for_ds_factor(pair):
    reference, ours = pair
    for params in ({"eval_q": 2, "excerpt_length": 1.0, "ds_factor": 5, "encodec_n_q": 2}, {"eval_q": 4}, {}):
        reference.set_params(**params)
        ours.set_params(**params)
        for name in ("eval_q", "ds_factor"):
            assert getattr(ours, name) == getattr(reference, name)
        assert ours._excerpt_samples() == reference.length_subwav
    assert (ours.eval_q, ours.excerpt_length, ours.ds_factor, ours.encodec_n_q) == (3, 3.0, 5, 2)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"eval_q": 0}, "eval_q must be a whole number from 1 to 4, got 0"),
        ({"eval_q": 5}, "from 1 to 4, got 5"),
        ({"eval_q": 1.5}, "whole number"),
        ({"excerpt_length": 0.0}, "excerpt_length must be at least 0.02"),
        ({"excerpt_length": float("nan")}, "excerpt_length"),
        ({"excerpt_length": float("inf")}, "excerpt_length"),
        ({"ds_factor": 0}, "ds_factor must be a whole number above 0"),
        ({"encodec_n_q": -1}, "encodec_n_q"),
    ],
)
def test_params_that_cannot_be(params, message):
    ours = StyleConditioner(CONFIG, WIDTH)
    with pytest.raises(ValueError, match=message):
        ours.set_params(**params)
    assert (ours.eval_q, ours.excerpt_length, ours.ds_factor) == (3, 3.0, 15)


# -- weights --------------------------------------------------------------------------------------------------------


def test_names_are_the_checkpoints(theirs, mert):
    ignored = ("inited", "cluster_size", "embed_avg", "num_batches_tracked")
    expected = {n for n in theirs.state_dict() if n.rsplit(".", 1)[-1] not in ignored}
    ours = StyleConditioner(CONFIG, WIDTH, mert)
    assert set(ours.state_dict()) == expected
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours.embed.weight, theirs.embed.weight)


def test_half_precision_weights_become_float32(theirs, mert):
    half = {n: w.half() if w.is_floating_point() else w for n, w in theirs.state_dict().items()}
    ours = StyleConditioner.from_weights(CONFIG, WIDTH, half, mert)
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {torch.float32}
    assert torch.equal(ours.output_proj.weight, half["output_proj.weight"].float())
    assert ours(_wav(), RATE, seed=0).dtype == torch.float32


def test_weights_that_do_not_fit_are_named():
    weights = StyleConditioner(CONFIG, WIDTH).state_dict()
    lacking = {n: w for n, w in weights.items() if n != "transformer.layers.2.norm1.bias"}
    for tensors, message in (
        (lacking, r"Missing key.*transformer\.layers\.2\.norm1\.bias"),
        ({**weights, "feat_extractor.weight": torch.zeros(1)}, r"Unexpected key.*feat_extractor\.weight"),
        ({**weights, "embed.bias": torch.zeros(3)}, r"size mismatch for embed\.bias"),
    ):
        with pytest.raises(CheckpointError, match=f"(?s)style conditioner.*{message}"):
            StyleConditioner.from_weights(CONFIG, WIDTH, tensors)


# -- MERT -----------------------------------------------------------------------------------------------------------


def _save(model, folder, suffix="bin", **changes):
    """As m-a-p publishes it: its own model_type and fields, weight norm by its old names, the mask of training."""
    settings = json.loads(model.config.to_json_string(use_diff=False)) | {
        "model_type": "mert_model", "auto_map": {"AutoModel": "modeling_MERT.MERTModel"}, "sample_rate": 24000,
        "feature_extractor_cqt": False, "deepnorm": False, "attention_relax": -1.0, **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    weights = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in model.state_dict().items()
    }
    assert "masked_spec_embed" in weights and "encoder.pos_conv_embed.conv.weight_g" in weights
    weights["final_proj.weight"] = torch.zeros(2)
    _write(weights, folder, suffix)
    return weights


def _write(weights, folder, suffix="bin"):
    if suffix == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        from safetensors.torch import save_file

        save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_mert_is_read_as_a_hubert(mert, tmp_path, suffix):
    _save(mert, tmp_path, suffix)
    before = torch.get_rng_state()
    loaded = load_mert(tmp_path)
    assert torch.equal(torch.get_rng_state(), before), "no weight is drawn"
    assert not loaded.training and not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    wav = convert_audio(_wav(3.0), RATE, 24000, 1)
    with torch.no_grad():
        expected = mert(wav).last_hidden_state
        assert expected.shape == (1, 224, 768)
        assert torch.equal(loaded(wav).last_hidden_state, expected)


def test_mert_is_loaded_at_the_first_waveform(mert, tmp_path):
    _save(mert, tmp_path)
    lazy = StyleConditioner(StyleConfig(**{**_fields(CONFIG), "feature_name": str(tmp_path)}), WIDTH)
    assert lazy(None, RATE).shape == (1, WIDTH) and not lazy._mert
    eager = StyleConditioner.from_weights(CONFIG, WIDTH, lazy.state_dict(), mert)
    assert torch.equal(lazy(_wav(), RATE, seed=0), eager(_wav(), RATE, seed=0))
    (tmp_path / "config.json").unlink()
    lazy(_wav(), RATE, seed=0)  # kept


@pytest.mark.parametrize("addition", [{"feature_extractor_cqt": True}, {"deepnorm": True}, {"attention_relax": 32.0}])
def test_what_hubert_lacks_is_refused(mert, tmp_path, addition):
    _save(mert, tmp_path, **addition)
    with pytest.raises(CheckpointError, match=f"{next(iter(addition))}: not supported.*MERT-v1-95M"):
        load_mert(tmp_path)


def test_mert_that_is_not_there_or_not_whole(mert, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json.*put m-a-p/MERT-v1-95M"):
        load_mert(tmp_path)
    weights = _save(mert, tmp_path, model_type="wav2vec2")
    with pytest.raises(CheckpointError, match="holds a 'wav2vec2' model"):
        load_mert(tmp_path)
    _save(mert, tmp_path)
    del weights["encoder.layer_norm.bias"]
    _write(weights, tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors of MERT: encoder\.layer_norm\.bias"):
        load_mert(tmp_path)
    _write(weights | {"encoder.layer_norm.bias": torch.zeros(3)}, tmp_path)
    with pytest.raises(CheckpointError, match="(?s)does not fit its config.json.*encoder.layer_norm.bias"):
        load_mert(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_mert(tmp_path)


class _Payload:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


def test_code_in_a_weights_file_does_not_run(mert, tmp_path, capsys):
    _save(mert, tmp_path)
    torch.save({"x": _Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        load_mert(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(_Payload(), protocol=2))
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        load_mert(tmp_path)
    assert "ran" not in capsys.readouterr().out
