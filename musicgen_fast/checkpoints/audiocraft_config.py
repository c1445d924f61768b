"""From the configuration of an audiocraft checkpoint (`xp.cfg`) to a `ModelConfig`.

Every field that changes results is honoured or refused by name; fields of training and of the choice of a kernel are
passed over. Defaults are those of audiocraft's own constructors, which apply where a file leaves a field out. Reads no
tensor: the widths that only the weights tell (the text encoder's) come in as an argument.
"""

from __future__ import annotations

from ..config import MelodyConfig, ModelConfig, PatternConfig, StyleConfig, TextConfig
from ..errors import CheckpointError
from ..pattern import build_pattern
from .xp_config import Section, shown

__all__ = ["check_family", "model_config", "text_encoder_name"]

_FAMILIES = {
    "transformer_lm_magnet": "MAGNeT (masked, not autoregressive)",
    "flow_matching": "JASCO (flow matching)",
}
_SOLVERS = {
    "magnet": "MAGNeT (masked, not autoregressive)",
    "audio-magnet": "MAGNeT (masked, not autoregressive)",
    "jasco": "JASCO (flow matching)",
    "musicgen_sourcesep": "MusicGen-Stem",
    "compression": "a codec alone",
    "diffusion": "MultiBand Diffusion",
    "watermark": "AudioSeal",
}
# field of transformer_lm: default of audiocraft's constructors, the values that the reference transformer computes
_COMPUTED = {
    "norm": ("layer_norm", "layer_norm"),
    "norm_first": (False, True),
    "bias_ff": (True, False),
    "bias_attn": (True, False),
    "bias_proj": (True, False),
    "causal": (False, True),
    "activation": ("relu", "gelu"),
    "past_context": (None, None),
    "layer_scale": (None, None),
    "positional_embedding": ("sin", "sin"),
    "max_period": (10000, 10000),
    "positional_scale": (1.0, 1.0),
    "qk_layer_norm": (False, False),
    "qk_layer_norm_cross": (False, False),
    "kv_repeat": (1, 1),
}
_READ = (
    *("dim", "num_heads", "num_layers", "hidden_scale", "n_q", "card"),
    *("two_step_cfg", "q_modeling", "cross_attention"),
)
# training, initialisation, and how attention is run: no effect on what is computed
_NO_EFFECT = (
    *("dropout", "attention_dropout", "emb_lr", "lr", "weight_decay", "cfg_dropout", "attribute_dropout"),
    *("weight_init", "depthwise_init", "zero_bias_init", "checkpointing"),
    *("custom", "memory_efficient", "attention_as_float32", "xpos"),
)


def check_family(root: Section) -> None:
    """CheckpointError naming the family of a checkpoint that is no MusicGen or AudioGen."""
    solver = root.get("solver")
    family = _SOLVERS.get(solver) if isinstance(solver, str) else None
    model = root.get("lm_model", "transformer_lm")
    if family is None and model != "transformer_lm":
        family = _FAMILIES.get(model, f"a {model!r}") if isinstance(model, str) else f"a {model!r}"
    if family is not None:
        field = root.name("lm_model" if model != "transformer_lm" else "solver")
        raise CheckpointError(f"{field}: the checkpoint is {family}; only MusicGen and AudioGen models are supported")


def model_config(root: Section, text_dim: int | None) -> ModelConfig:
    """The `ModelConfig` of a configuration that passed `check_family`.

    Args:
        text_dim: D, read from the projection of the text; None for a model without text.

    Raises:
        CheckpointError: a field whose value is not supported, or fields that contradict each other.
    """
    lm = root.section("transformer_lm")
    _check_transformer(lm)
    codebooks, dim = lm.positive("n_q", 8, most=256), lm.positive("dim", 128)
    conditioners = root.section("conditioners")
    conditioning = _conditioning(root, conditioners)
    lm.refuse_unless("cross_attention", False, *((True, False) if conditioning == "cross" else (False,)))
    seconds = root.section("dataset").seconds("segment_duration", 30.0)
    kind = conditioners.section("self_wav").get("model")
    pattern = _pattern(root.section("codebooks_pattern"), lm, codebooks)
    try:
        return ModelConfig(
            dim=dim,
            num_layers=lm.positive("num_layers", most=1024),
            num_heads=lm.positive("num_heads", 8),
            ffn_dim=_ffn_dim(lm, dim),
            num_codebooks=codebooks,
            vocab_size=lm.positive("card", 1024),
            pattern=pattern,
            conditioning=conditioning,
            text=TextConfig(name=text_encoder_name(root), dim=text_dim) if text_dim is not None else None,
            melody=_melody(conditioners.section("self_wav"), seconds) if kind == "chroma_stem" else None,
            style=_style(conditioners.section("self_wav")) if kind == "style" else None,
            audio_channels=_channels(root, codebooks),
            max_duration=seconds,
            cfg_coef=root.section("classifier_free_guidance").finite("inference_coef", 3.0),
            two_step_cfg=lm.flag("two_step_cfg"),
            family=_family(root, has_wav=kind is not None),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{root.label}{error}") from error


def _ffn_dim(lm: Section, dim: int) -> int:
    width = lm.finite("hidden_scale", 4) * dim
    if not 1 <= width <= 1 << 24:
        raise CheckpointError(f"{lm.name('hidden_scale')} is {lm.get('hidden_scale')}, expected a number like 4")
    return int(width)


def _check_transformer(lm: Section) -> None:
    for field, (default, computed) in _COMPUTED.items():
        lm.refuse_unless(field, default, computed)
    known = {*_COMPUTED, *_READ, *_NO_EFFECT}
    for field, value in lm.values.items():
        if field not in known and value not in (None, False):
            raise CheckpointError(f"{lm.name(field)} is {shown(value)}; this package does not know that option")


def _conditioning(root: Section, conditioners: Section) -> str:
    """'cross' or 'prefix', from the fuser: which condition goes where."""
    fuser = root.section("fuser")
    for method in ("sum", "input_interpolate"):
        if fuser.names(method):
            raise CheckpointError(f"{fuser.name(method)} is {list(fuser.names(method))}; not supported")
    fuser.refuse_unless("cross_attention_pos_emb", False, False, None)
    cross, prefix = fuser.names("cross"), fuser.names("prepend")
    present = {name for name in conditioners.values if name != "args"}
    for name in sorted(present - {"description", "self_wav"}, key=str):
        raise CheckpointError(f"{conditioners.name(name)}: the supported conditions are 'description' and 'self_wav'")
    if "description" in present:
        conditioners.section("description").refuse_unless("model", None, "t5")
        conditioners.section("description").section("t5").refuse_unless("normalize_text", False, False)
    if "self_wav" in present:
        conditioners.section("self_wav").refuse_unless("model", None, "chroma_stem", "style")
    if set(cross) | set(prefix) != present or len(cross) + len(prefix) != len(present):
        raise CheckpointError(
            f"{fuser.label} cross {list(cross)} and prepend {list(prefix)} do not place each of the conditions "
            f"{sorted(present, key=str)} once"
        )
    if cross not in ((), ("description",)) or (cross and prefix):
        raise CheckpointError(f"{fuser.name('cross')} is {list(cross)} with prepend {list(prefix)}: not supported")
    return "cross" if cross else "prefix"


def text_encoder_name(root: Section) -> str:
    """The T5 that a checkpoint names (a hub id), 't5-base' where it names none."""
    return str(root.section("conditioners").section("description").section("t5").get("name", "t5-base"))


_MOST_CHROMA = 256  # the filters of a spectrum are a matrix of this by half a window


def _melody(conditioner: Section, seconds: float) -> MelodyConfig:
    chroma = conditioner.section("chroma_stem")
    for field, default in (("winlen", None), ("winhop", None), ("nfft", None)):
        chroma.refuse_unless(field, default, None)
    norm = chroma.get("norm", "inf")
    if str(norm).lower() not in ("inf", ".inf"):
        raise CheckpointError(f"{chroma.name('norm')} is {norm!r}; this package computes only the infinity norm")
    return MelodyConfig(
        sample_rate=chroma.positive("sample_rate", 32000),
        n_chroma=chroma.positive("n_chroma", 12, most=_MOST_CHROMA),
        radix2_exp=chroma.positive("radix2_exp", 14, most=17),
        duration=seconds,
        argmax=chroma.flag("argmax"),
    )


# `transformer_scale` of audiocraft's StyleConditioner: width, heads, layers
_STYLE_SCALES = {"xsmall": (256, 8, 4), "default": (512, 8, 8), "large": (1024, 16, 24), "none": (512, 8, 0)}


def _style(conditioner: Section) -> StyleConfig:
    style = conditioner.section("style")
    style.refuse_unless("model_name", None, "mert")
    scale = style.get("transformer_scale", "default")
    if not isinstance(scale, str) or scale not in _STYLE_SCALES:
        known = ", ".join(_STYLE_SCALES)
        raise CheckpointError(f"{style.name('transformer_scale')} is {shown(scale)}, expected one of {known}")
    width, heads, layers = _STYLE_SCALES[scale]
    return StyleConfig(
        sample_rate=style.positive("sample_rate", 32000),
        dim=width,
        num_heads=heads,
        num_layers=layers,
        ffn_dim=4 * width,
        num_codebooks=style.positive("n_q_out", 6, most=256) if style.get("n_q_out", 6) else 0,
        codebook_size=style.positive("bins", 1024),
        batch_norm=style.flag("batch_norm", True),
        ds_factor=style.positive("ds_factor", 15),
        eval_q=style.integer("eval_q", 3),
        excerpt_length=style.seconds("length", 3.0),
        use_middle=style.flag("use_middle_of_segment"),
    )


_LONGEST_DELAY = 4096  # steps; the tables of a pattern are as long as its delays


def _pattern(section: Section, lm: Section, codebooks: int) -> PatternConfig:
    """The codebook pattern. audiocraft finds the options of 'musiclm' under that name only, not under 'music_lm'."""
    kind = section.get("modeling")
    if kind is None:
        kind = lm.get("q_modeling")
        if kind is None:
            raise CheckpointError(f"{section.name('modeling')} is missing")
        section = Section({}, section.label)
    options = section.section(kind) if isinstance(kind, str) else section
    pattern = PatternConfig(
        kind=str(kind),
        delays=options.integers("delays"),
        flatten_first=options.integer("flatten_first", 0),
        empty_initial=options.integer("empty_initial", 0),
        flattening=options.integers("flattening"),
        group_by=options.integer("group_by", 2),
    )
    steps = (*pattern.delays, *pattern.flattening, pattern.flatten_first, pattern.empty_initial)
    if max(steps) > _LONGEST_DELAY:
        raise CheckpointError(f"{section.name(pattern.kind)} has a step of {max(steps)}, at most {_LONGEST_DELAY}")
    try:
        build_pattern(pattern, codebooks, 4)
    except (ValueError, LookupError, ArithmeticError) as error:
        raise CheckpointError(f"{section.name('modeling')}: {error}") from error
    return pattern


def _channels(root: Section, codebooks: int) -> int:
    stereo = root.section("interleave_stereo_codebooks")
    if not stereo.flag("use"):
        return 1
    stereo.refuse_unless("per_timestep", False, False, None)
    if codebooks % 2:
        raise CheckpointError(f"{root.name('transformer_lm.n_q')} is {codebooks}, but stereo codebooks come in pairs")
    return 2


def _family(root: Section, has_wav: bool) -> str:
    """AudioGen says so, or (files without a solver) is recognised by its 16 kHz."""
    solver = root.get("solver")
    if solver == "audiogen" or (solver is None and root.get("sample_rate") == 16000 and not has_wav):
        return "audiogen"
    return "musicgen"
