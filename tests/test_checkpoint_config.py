"""Configurations: what is honoured, what is refused by name, and OmegaConf's interpolations without OmegaConf."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from musicgen_fast.checkpoints import CheckpointError, load_checkpoint
from musicgen_fast.checkpoints.audiocraft_config import model_config
from musicgen_fast.checkpoints.xp_config import Section, parse_config
from musicgen_fast.config import CodecConfig, MelodyConfig, PatternConfig, StyleConfig

from .checkpoint_configs import edited, xp_cfg
from .checkpoint_writers import edit_json, tiny, write_audiocraft, write_transformers


@pytest.fixture(scope="module")
def written():
    return {kind: tiny(kind) for kind in ("text", "stereo", "melody", "style")}


def config_of(checkpoint, text_dim: int | None = 24, **changes):
    """`ModelConfig` of the configuration that an export of `checkpoint` would hold; field names with __ for dots."""
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    cfg = parse_config(yaml.safe_dump(edited(xp_cfg(checkpoint), fields)), "xp.cfg")
    return model_config(Section(cfg, "xp.cfg: "), text_dim)


@pytest.mark.parametrize("kind", ["text", "stereo", "melody", "style"])
def test_the_configuration_comes_back(written, kind):
    assert config_of(written[kind]) == written[kind].config


REFUSED = {
    "transformer_lm.norm_first": False,
    "transformer_lm.bias_ff": True,
    "transformer_lm.bias_attn": True,
    "transformer_lm.bias_proj": True,
    "transformer_lm.causal": False,
    "transformer_lm.activation": "relu",
    "transformer_lm.norm": "rms_norm",
    "transformer_lm.past_context": 100,
    "transformer_lm.layer_scale": 1e-4,
    "transformer_lm.positional_embedding": "rope",
    "transformer_lm.positional_scale": 0.5,
    "transformer_lm.max_period": 1000,
    "transformer_lm.qk_layer_norm": True,
    "transformer_lm.qk_layer_norm_cross": True,
    "transformer_lm.kv_repeat": 2,
    "transformer_lm.flow_dim": 128,
    "transformer_lm.dim": 33,
    "transformer_lm.num_layers": ...,
    "transformer_lm.card": "many",
    "transformer_lm.n_q": 10**9,
    "codebooks_pattern.modeling": "spiral",
    "codebooks_pattern.delay.delays": [0, 1],
    "codebooks_pattern.delay": {"delays": [0, 1, 2, 10**9]},
    "fuser.sum": ["description"],
    "fuser.input_interpolate": ["description"],
    "fuser.cross_attention_pos_emb": True,
    "fuser.cross": [],
    "fuser.prepend": ["description"],
    "conditioners.description.model": "clap",
    "conditioners.description.t5.normalize_text": True,
    "conditioners.genre": {"model": "lut"},
    "interleave_stereo_codebooks.per_timestep": True,
    "interleave_stereo_codebooks": {"use": True, "per_timestep": True},
    "dataset.segment_duration": "${nowhere}",
    "dataset": {"segment_duration": 0},
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_would_be_another_model_is_refused_by_name(written, field):
    if field == "interleave_stereo_codebooks.per_timestep":
        assert config_of(written["text"], **{field.replace(".", "__"): True}).audio_channels == 1  # not used: no matter
        return
    with pytest.raises(CheckpointError) as caught:
        config_of(written["text"], **{field: REFUSED[field]})
    last = field.removeprefix("transformer_lm.dim").split(".")[-1]
    assert "xp.cfg: " in str(caught.value) and last.split("_")[0] in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("style", "conditioners.self_wav.style.model_name", "encodec"),
        ("style", "conditioners.self_wav.style.transformer_scale", "gigantic"),
        ("melody", "conditioners.self_wav.chroma_stem.winhop", 512),
        ("melody", "conditioners.self_wav.chroma_stem.norm", 2),
        ("melody", "conditioners.self_wav.model", "wav2vec"),
        ("melody", "fuser.prepend", ["description"]),
    ],
)
def test_waveform_conditioners_that_are_refused(written, kind, field, value):
    with pytest.raises(CheckpointError, match=field.split(".")[-1]):
        config_of(written[kind], **{field: value})


@pytest.mark.parametrize(
    "field",
    ["memory_efficient", "custom", "attention_as_float32", "checkpointing", "dropout", "weight_init", "emb_lr", "xpos"],
)
def test_fields_without_effect_are_passed_over(written, field):
    for value in (True, "torch", 0.5, ...):
        assert config_of(written["text"], **{f"transformer_lm__{field}": value}) == written["text"].config


def test_fields_that_are_honoured(written):
    config = config_of(
        written["text"],
        transformer_lm__hidden_scale=2.5,
        transformer_lm__two_step_cfg=True,
        classifier_free_guidance__inference_coef="4.5",
        dataset__segment_duration=12.5,
        conditioners__description__t5__name="google/flan-t5-large",
    )
    assert (config.ffn_dim, config.two_step_cfg, config.cfg_coef, config.max_duration) == (80, True, 4.5, 12.5)
    assert config.text.name == "google/flan-t5-large"
    assert config_of(written["text"], dataset=...).max_duration == 30.0
    melody = config_of(written["melody"], conditioners__self_wav__chroma_stem__argmax=..., dataset__segment_duration=10)
    assert melody.melody == MelodyConfig(duration=10.0, argmax=False)


def test_style_settings(written):
    style = "conditioners__self_wav__style__"
    config = config_of(written["style"], **{style + "transformer_scale": "default", style + "bins": 1024})
    assert config.style == StyleConfig()
    config = config_of(
        written["style"], **{style + "transformer_scale": "none", style + "n_q_out": 0, style + "length": 4}
    )
    assert (config.style.num_layers, config.style.num_codebooks, config.style.excerpt_length) == (0, 0, 4.0)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"codebooks_pattern__modeling": "parallel"}, PatternConfig("parallel")),
        (
            {"codebooks_pattern__modeling": "unroll"},
            PatternConfig("unroll", delays=(0, 0, 0, 0), flattening=(0, 1, 2, 3)),
        ),
        ({"codebooks_pattern__modeling": "coarse_first"}, PatternConfig("coarse_first", delays=(0, 0, 0))),
        # audiocraft looks for the options under the provider's name, the shipped configuration has them under another
        ({"codebooks_pattern__modeling": "musiclm"}, PatternConfig("musiclm", group_by=2)),
        (
            {"codebooks_pattern__modeling": "musiclm", "codebooks_pattern__musiclm": {"group_by": 4}},
            PatternConfig("musiclm", group_by=4),
        ),
        ({"codebooks_pattern__delay__flatten_first": 2}, PatternConfig(delays=(0, 1, 2, 3), flatten_first=2)),
        ({"codebooks_pattern__delay": None}, PatternConfig()),
        ({"codebooks_pattern__modeling": None, "transformer_lm__q_modeling": "delay"}, PatternConfig()),
    ],
)
def test_codebook_patterns(written, changes, pattern):
    assert config_of(written["text"], **changes).pattern == pattern


def test_unconditional_and_text_prefix_models(written):
    nothing = config_of(written["text"], text_dim=None, conditioners=None, fuser={"cross": [], "prepend": False})
    assert nothing.text is None and nothing.conditioning == "prefix"
    prefix = config_of(written["text"], fuser__cross=[], fuser__prepend=["description"])
    assert prefix.conditioning == "prefix" and prefix.melody is None and prefix.text.dim == 24


def test_audiogen(tmp_path):
    codec = CodecConfig(
        sample_rate=16000, ratios=(8, 5, 4, 2), num_filters=4, dimension=16, lstm_layers=1, codebook_size=64
    )
    folder = write_audiocraft(tmp_path, tiny(codec_config=codec), changes={"solver": "audiogen"})
    loaded = load_checkpoint(folder)
    assert loaded.config.family == "audiogen" and loaded.codec_config.ratios == (8, 5, 4, 2)
    write_audiocraft(tmp_path, tiny(codec_config=codec), changes={"solver": ...})
    assert load_checkpoint(folder).config.family == "audiogen"
    write_audiocraft(tmp_path, tiny(codec_config=codec))
    assert load_checkpoint(folder).config.family == "musicgen"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"lm_model": "transformer_lm_magnet", "solver": "magnet"}, "MAGNeT"),
        ({"lm_model": "flow_matching", "solver": "jasco"}, "JASCO"),
        ({"solver": "musicgen_sourcesep"}, "MusicGen-Stem"),
        ({"solver": "compression"}, "a codec alone"),
        ({"lm_model": "mamba_lm"}, "mamba_lm"),
    ],
)
def test_other_families_are_refused_by_name(tmp_path, written, changes, name):
    folder = write_audiocraft(tmp_path, written["text"], changes=changes)
    with pytest.raises(CheckpointError, match=f"state_dict.bin: xp.cfg.*{name}"):
        load_checkpoint(folder)


def test_codec_and_model_must_fit(tmp_path, written):
    folder = write_audiocraft(tmp_path, written["text"], changes={"sample_rate": 44100})
    with pytest.raises(CheckpointError, match="44100.*32000"):
        load_checkpoint(folder)
    codec = replace(written["text"].codec_config, num_codebooks=2)
    write_audiocraft(tmp_path, tiny(codec_config=codec))
    with pytest.raises(CheckpointError, match="uses 4 codebooks.*has 2 of 64"):
        load_checkpoint(folder)
    wide = replace(written["text"].codec_config, num_codebooks=6)
    write_audiocraft(tmp_path, tiny(codec_config=wide), changes={"compression_model_n_q": 4})
    assert load_checkpoint(folder).codec_config.num_codebooks == 6  # the first four are used


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("decoder", {"activation_function": "relu"}),
        ("decoder", {"scale_embedding": True}),
        ("decoder", {"audio_channels": 3}),
        ("decoder", {"pad_token_id": 3}),
        ("decoder", {"cross_attention_hidden_size": 24}),
        ("decoder", {"num_codebooks": 0}),
        ("text_encoder", {"model_type": "bert"}),
        (None, {"model_type": "encodec"}),
        (None, {"quantization_config": {"bits": 8}}),
        (None, {"audio_encoder": None}),
        (None, {"decoder": None}),
    ],
)
def test_transformers_configurations_that_are_refused(tmp_path, written, section, change):
    folder = write_transformers(tmp_path, written["text"])
    edit_json(folder / "config.json", section, **change)
    (field,) = change
    words = "'bert'" if section == "text_encoder" else field
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(folder)


# ---- interpolations


def test_interpolations():
    text = """
    rate: 32000
    copy: ${rate}
    text: at ${rate} Hz
    nested: {which: rate, value: "${${.which}}", up: "${..rate}", back: "${nested.value}", item: "${list[1]}"}
    list: [1, "${rate}", {deep: "${list.0}"}]
    section: ${nested}
    through: ${section.which}
    loop: ${pool}
    pool: ${loop}
    self: ${self}
    env: ${oc.env:HOME}
    gone: ${not.there}
    mixed: ${rate}/${not.there}
    nothing: null
    none: v${nothing}
    """
    cfg = parse_config(text, "x")
    assert cfg["copy"] == 32000 and cfg["text"] == "at 32000 Hz"
    assert cfg["nested"] == {"which": "rate", "value": 32000, "up": 32000, "back": 32000, "item": 32000}
    assert cfg["list"] == [1, 32000, {"deep": 1}]
    assert cfg["section"] == cfg["nested"] and cfg["through"] == "rate"
    for name in ("loop", "pool", "self", "env", "gone", "mixed"):
        assert "${" in cfg[name]
    assert cfg["none"] == "vnull"
    with pytest.raises(CheckpointError, match="y: gone is '.{not.there}'"):
        Section(cfg, "y: ").get("gone")


def test_interpolation_equals_omegaconf(written):
    omegaconf = pytest.importorskip("omegaconf", reason="the reference")
    text = yaml.safe_dump(edited(xp_cfg(written["style"]), {"generate.home": ...}))
    expected = omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.create(text), resolve=True)
    mine = parse_config(text, "x")
    expected["optim"] = mine["optim"]  # PyYAML reads 1e-4 as text, OmegaConf as a number
    assert mine == expected


def test_configurations_that_grow_or_dive():
    doubled = "\n".join(f"a{i}: ${{a{i + 1}}}${{a{i + 1}}}" for i in range(60)) + "\na60: xxxx"
    assert len(str(parse_config(doubled, "x"))) < 100_000
    sections = "\n".join(f"s{i}: {{l: '${{s{i + 1}}}', r: '${{s{i + 1}}}'}}" for i in range(60)) + "\ns60: {x: 1}"
    assert parse_config(sections, "x")["s59"] == {"l": {"x": 1}, "r": {"x": 1}}
    with pytest.raises(CheckpointError):
        parse_config("[" * 5000, "x")
    with pytest.raises(CheckpointError, match="x is not valid YAML"):
        parse_config("a: !!python/object/apply:os.system ['true']", "x")
    with pytest.raises(CheckpointError, match="x holds a str"):
        parse_config("just text", "x")
