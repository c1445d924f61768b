"""LoRA adapters: merged weights and logits are those of PEFT itself, for every kind of target and every pattern."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from musicgen_fast import AudioGen, MusicGen
from musicgen_fast.checkpoints import CheckpointError, load_checkpoint
from musicgen_fast.model import Transformer

from .checkpoint_writers import assert_same, edit_json, tiny, write_audiocraft, write_transformers
from .test_checkpoint_references import transformers_model

peft = pytest.importorskip("peft", reason="the reference of merged adapters")

ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
FFN = ["fc1", "fc2"]
BOOKS = [f"{part}.{k}" for k in range(4) for part in ("lm_heads", "embed_tokens")]
T5 = ["q", "k", "v", "o", "wi", "wo"]
PATTERNS = {
    "rank_pattern": {"decoder.model.decoder.layers.0.fc1": 2, r".*\.encoder_attn\.(k|v)_proj": 7, "lm_heads.2": 1},
    "alpha_pattern": {"fc2": 3, r"layers\.1\.self_attn\.\w+": 5, "embed_tokens.1": 11, "T5": 1},
}
CASES: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION},
    "ffn": {"target_modules": FFN, "lora_alpha": 17},
    "heads": {"target_modules": [f"lm_heads.{k}" for k in range(4)]},
    "embeddings": {"target_modules": [f"embed_tokens.{k}" for k in range(4)]},
    "projections": {"target_modules": ["enc_to_dec_proj", *ATTENTION[:1]]},
    "t5": {"target_modules": T5},
    "t5-table": {"target_modules": r".*(encoder\.embed_tokens|fc1)"},
    "everything": {"target_modules": [*ATTENTION, *FFN, *BOOKS, *T5, "enc_to_dec_proj"]},
    "patterns": {"target_modules": [*ATTENTION, *FFN, *BOOKS], **PATTERNS},
    "rslora": {"target_modules": [*ATTENTION, *FFN, *BOOKS], "use_rslora": True, **PATTERNS},
    "fan-in-fan-out": {"target_modules": [*FFN, *BOOKS], "fan_in_fan_out": True},
    "biases": {"target_modules": ["enc_to_dec_proj", *FFN], "bias": "lora_only"},
    "trained-copies": {"target_modules": FFN, "modules_to_save": ["enc_to_dec_proj", "lm_heads.1", "layer_norm"]},
    "regex": {"target_modules": r".*decoder\.layers\.1\..*(fc1|v_proj)"},
    "gaussian": {"target_modules": FFN, "init_lora_weights": "gaussian", "r": 1},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """transformers' model and the folder that it was saved in."""
    folder = tmp_path_factory.mktemp("base")
    model = transformers_model("text")
    model.save_pretrained(folder)
    return model, folder


def make_adapter(model: torch.nn.Module, folder: Path, seed: int = 0, **options: Any) -> Any:
    """An adapter by PEFT with random weights, as if trained, saved into `folder`; the wrapped model."""
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


@torch.no_grad()
def logits_of(loaded, tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    ours = Transformer.from_weights(loaded.config, loaded.lm)
    return ours(tokens, cross=ours.text_proj(states))[0].transpose(0, 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_merged_weights_and_logits_are_pefts(trained, tmp_path, case):
    model, base = trained
    wrapped = make_adapter(model, tmp_path / "adapter", **CASES[case])
    torch.manual_seed(1)
    tokens, states, ids = torch.randint(0, 65, (1, 4, 9)), torch.randn(1, 5, 24), torch.tensor([[5, 9, 30, 1]])
    inner = wrapped.get_base_model()
    with torch.no_grad():  # PEFT's own forward pass, not merged
        projected = inner.enc_to_dec_proj(states)
        expected = inner.decoder(tokens[0], encoder_hidden_states=projected).logits
        text = inner.text_encoder(ids).last_hidden_state
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")

    loaded, merged = load_checkpoint(base, adapter=tmp_path / "adapter"), load_checkpoint(tmp_path / "merged")
    for ours, theirs in ((loaded.lm, merged.lm), (loaded.text.tensors, merged.text.tensors)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7, msg=name)
    torch.testing.assert_close(logits_of(loaded, tokens, states), expected, rtol=1e-4, atol=1e-4)
    plain = load_checkpoint(base)
    changed = [n for n in plain.lm if not torch.equal(plain.lm[n], loaded.lm[n])]
    changed += [n for n in plain.text.tensors if not torch.equal(plain.text.tensors[n], loaded.text.tensors[n])]
    assert changed
    assert_same(plain.codec, loaded.codec)

    from transformers import T5Config, T5EncoderModel

    encoder = T5EncoderModel(T5Config(**loaded.text.config)).eval()
    encoder.load_state_dict(loaded.text.tensors, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(encoder(ids).last_hidden_state, text, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def adapter(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    make_adapter(trained[0], folder, target_modules=[*ATTENTION, *FFN, *BOOKS, *T5, "enc_to_dec_proj"])
    return folder


def test_scale(trained, adapter):
    """0 is the base, and the update grows in proportion."""
    base = load_checkpoint(trained[1])
    none, half, full = (load_checkpoint(trained[1], adapter=adapter, adapter_scale=s) for s in (0, 0.5, 1.0))
    assert_same(none.lm, base.lm)
    assert_same(none.text.tensors, base.text.tensors)
    for name in base.lm:
        torch.testing.assert_close(half.lm[name] - base.lm[name], (full.lm[name] - base.lm[name]) / 2)
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="adapter_scale must be finite"):
            load_checkpoint(trained[1], adapter=adapter, adapter_scale=wrong)
    with pytest.raises(TypeError, match="adapter_scale must be a number"):
        load_checkpoint(trained[1], adapter=adapter, adapter_scale="1")


def test_merged_in_float32_before_the_cast(trained, adapter):
    """Rounded once: what float16 gets is the float32 result, not a sum of rounded parts."""
    full, half = (load_checkpoint(trained[1], adapter=adapter, dtype=dtype).lm for dtype in (None, torch.float16))
    for name, tensor in full.items():
        assert torch.equal(half[name], tensor.to(half[name].dtype)), name


def test_an_adapter_on_audiocrafts_files(trained, adapter, tmp_path):
    """The same update whatever layout the base is stored in; half precision files are widened first."""
    written = load_checkpoint(trained[1])
    folder = write_audiocraft(tmp_path, written, half=True)
    plain, merged = load_checkpoint(folder), load_checkpoint(folder, adapter=adapter)
    reference = load_checkpoint(trained[1], adapter=adapter)
    for name in plain.lm:
        update = reference.lm[name] - written.lm[name]
        torch.testing.assert_close(merged.lm[name] - plain.lm[name], update, rtol=1e-3, atol=1e-5)
    assert_same(merged.text.tensors, reference.text.tensors)


def test_adapters_of_one_part_and_of_audiocrafts_own_model(trained, tmp_path):
    """Modules named from the decoder or the T5 on, and by audiocraft's names."""
    model, base = trained
    plain = load_checkpoint(base)
    make_adapter(model.decoder, tmp_path / "decoder", target_modules=["fc1", "lm_heads.3"])
    changed = load_checkpoint(base, adapter=tmp_path / "decoder")
    assert {n for n in plain.lm if not torch.equal(plain.lm[n], changed.lm[n])} == {
        "layers.0.ffn_in.weight", "layers.1.ffn_in.weight", "heads.weight",
    }  # fmt: skip
    assert torch.equal(plain.lm["heads.weight"][:192], changed.lm["heads.weight"][:192])
    make_adapter(model.text_encoder, tmp_path / "t5", target_modules=["q"])
    changed = load_checkpoint(base, adapter=tmp_path / "t5")
    assert_same(plain.lm, changed.lm)
    assert {n for n, t in plain.text.tensors.items() if not torch.equal(t, changed.text.tensors[n])} == {
        f"encoder.block.{i}.layer.0.SelfAttention.q.weight" for i in range(2)
    }

    class Audiocraft(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = torch.nn.ModuleList([torch.nn.Embedding(65, 32) for _ in range(4)])
            layer = torch.nn.Module()
            layer.linear2 = torch.nn.Linear(64, 32, bias=False)
            self.transformer = torch.nn.Module()
            self.transformer.layers = torch.nn.ModuleList([layer])

    make_adapter(Audiocraft(), tmp_path / "ac", target_modules=["emb.2", "linear2"])
    changed = load_checkpoint(base, adapter=tmp_path / "ac").lm
    different = {n for n in plain.lm if not torch.equal(plain.lm[n], changed[n])}
    assert different == {"emb.weight", "layers.0.ffn_out.weight"}
    rows = (plain.lm["emb.weight"] != changed["emb.weight"]).any(dim=1)
    assert rows[130:195].all() and not rows[:130].any() and not rows[195:].any()


def test_the_drop_in_classes(trained, adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("MUSICGEN_FAST_DECODER", "torch")  # which keeps the weights as they are
    written = load_checkpoint(trained[1])
    folder = write_transformers(tmp_path, written)
    plain, merged = (MusicGen.get_pretrained(folder, "cpu", adapter=a) for a in (None, adapter))
    for model in (plain, merged):
        model.set_generation_params(use_sampling=False, duration=0.1)
    assert not torch.equal(
        *(model.generate_unconditional(1, return_tokens=True, seed=0)[1] for model in (plain, merged))
    )
    assert torch.equal(
        merged.lm.transformer.heads.weight,
        AudioGen.get_pretrained(folder, "cpu", adapter=adapter).lm.transformer.heads.weight,
    )


# ---- refusals


def save(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """An adapter by hand."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "owner/base", **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


HEAD = "base_model.model.decoder.lm_heads.0."


def factors(name: str = HEAD, rank: int = 2, rows: int = 64, columns: int = 32) -> dict[str, torch.Tensor]:
    return {
        f"{name}lora_A.weight": torch.ones(rank, columns),
        f"{name}lora_B.weight": torch.ones(rows, rank),
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_transformers(tmp_path_factory.mktemp("tiny"), tiny())


def test_by_hand(base, tmp_path):
    plain, merged = load_checkpoint(base).lm, load_checkpoint(base, adapter=save(tmp_path, factors())).lm
    assert torch.equal(merged["heads.weight"][:64], plain["heads.weight"][:64] + 4)  # 4 / 2 * (1 * 1 + 1 * 1)
    torch.save({k: t.half() for k, t in factors().items()}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    assert_same(load_checkpoint(base, adapter=tmp_path).lm, merged)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "LOHA"}, "'LOHA'; only LoRA"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"peft_type": ["LORA"]}, "only LoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "copied layers"),
        ({"target_parameters": ["weight"]}, "bare parameters"),
        ({"trainable_token_indices": [1]}, "rows of an embedding"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"r": 0}, "r is 0"),
        ({"r": 3}, "rank 3, its weights have rank 2"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much'"),
        ({"rank_pattern": {"lm_heads.0": 5}}, "rank 5"),
        ({"rank_pattern": [1]}, "expected a mapping"),
        ({"alpha_pattern": {"lm_heads.(": 5}}, "no regular expression"),
        ({"alpha_pattern": {"(a+)+b": 5}}, "no name or simple pattern"),
        ({"alpha_pattern": {"lm_heads.0": None}}, "expected a number"),
    ],
)
def test_configurations_that_are_refused(base, tmp_path, config, words):
    folder = save(tmp_path, factors(), **config)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_checkpoint(base, adapter=folder)
    assert "adapter_config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (factors("base_model.model.decoder.lm_heads.9."), "lm_heads.9'.*does not have.*owner/base"),
        (factors("base_model.model.audio_encoder.decoder.layers.0.conv."), "audio_encoder.*does not have"),
        (factors("base_model.model.text_encoder.encoder.block.7.layer.0.SelfAttention.q."), "block.7"),
        (factors("base_model.model.transformer.layers.0.cross_attention.in_proj_weight."), "does not have"),
        (factors(columns=31), r"lora_A.*\[2, 31\].*\[2, 32\]"),
        (factors(rows=63), r"lora_B.*\[63, 2\].*\[64, 2\]"),
        ({f"{HEAD}lora_A.weight": torch.ones(2, 32)}, "without its other half"),
        ({**factors(), f"{HEAD}lora_magnitude_vector": torch.ones(64)}, "DoRA"),
        ({**factors(), f"{HEAD}lora_B.bias": torch.ones(64)}, "only plain LoRA"),
        ({f"{HEAD}hada_w1_a": torch.ones(64)}, "hada_w1_a|lm_heads.0'"),
        ({k: t.int() for k, t in factors().items()}, "expected real numbers"),
        ({k: t * float("nan") for k, t in factors().items()}, "NaN"),
        ({f"{HEAD}lora_A.weight": torch.ones(32), f"{HEAD}lora_B.weight": torch.ones(64)}, "shape"),
        ({f"{HEAD}weight": torch.ones(3, 3)}, r"\[3, 3\]"),
    ],
)
def test_weights_that_are_refused(base, tmp_path, tensors, words):
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(base, adapter=save(tmp_path, tensors))


def test_what_is_no_adapter(base, tmp_path):
    with pytest.raises(CheckpointError, match="has no adapter_config.json"):
        load_checkpoint(base, adapter=base)
    with pytest.raises(CheckpointError, match="neither an existing folder"):
        load_checkpoint(base, adapter=tmp_path / "nowhere")
    folder = save(tmp_path / "a", factors())
    with pytest.raises(CheckpointError, match=r"LoRA adapter.*get_pretrained\('owner/base', adapter="):
        load_checkpoint(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="adapter_model.safetensors or adapter_model.bin"):
        load_checkpoint(base, adapter=folder)
    with pytest.raises(CheckpointError, match="random"):
        load_checkpoint("random:small", adapter=save(tmp_path / "b", factors()))


def test_an_update_of_a_projection_that_the_model_lacks(tmp_path):
    from musicgen_fast.config import TextConfig

    written = tiny(text=TextConfig(dim=32))
    del written.lm["text_proj.weight"], written.lm["text_proj.bias"]
    folder = write_transformers(tmp_path / "model", written)
    adapter = save(tmp_path / "adapter", factors("base_model.model.enc_to_dec_proj.", rows=32))
    with pytest.raises(CheckpointError, match="text_proj.weight.*adapter"):
        load_checkpoint(folder, adapter=adapter)


def test_slow_patterns_end(base, tmp_path):
    patterns = {rf".*{'a' * i}.*\.no" + str(i): 1 for i in range(3000)}
    folder = save(tmp_path, factors(), alpha_pattern=patterns)
    edit_json(folder / "adapter_config.json", r=2)
    started = time.monotonic()
    try:
        load_checkpoint(base, adapter=folder)
    except CheckpointError:
        pass
    assert time.monotonic() - started < 4
