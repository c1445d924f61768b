"""Hostile and broken checkpoints: one clear error each, soon, in bounded memory, and nothing of theirs is run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from musicgen_fast import MusicGen
from musicgen_fast.checkpoints import CheckpointError, load_checkpoint

from .checkpoint_configs import codec_xp_cfg, xp_cfg
from .checkpoint_writers import audiocraft_state, edit_json, tiny, write_audiocraft, write_transformers
from .hostile_files import corpus, write_corpus

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(corpus(Path("marker")))
SECONDS = 2.0
MEGABYTES = 200  # that one case may add to the highest use of memory; the files hold up to 1 GiB, on paper

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory as Linux has them")


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What a child process with a limit of memory said of every case."""
    root = tmp_path_factory.mktemp("corpus")
    marker = tmp_path_factory.mktemp("marker") / "executed"
    write_corpus(root, marker)
    write_transformers(root / "good", tiny())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.hostile_files", str(root)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not marker.exists(), "code of a file was run"
    return {report["case"]: report for report in map(json.loads, done.stdout.splitlines())}


def test_the_child_loads_what_is_sound(reports):
    assert reports.pop("good")["raised"] == ""
    assert sorted(reports) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_one_clear_error_each(reports, name):
    report = reports[name]
    assert report["raised"] == "CheckpointError", report
    assert report["seconds"] < SECONDS and report["grown"] < MEGABYTES, report
    message = report["message"]
    assert 20 < len(message) < 6000 and "weights_only" not in message


# ---- truncated


def truncated(folder: Path, layout: str) -> tuple[Path, Path, dict[str, Any]]:
    """(what to load, the file to cut, arguments) for one shape of a checkpoint."""
    written = tiny(num_layers=1)
    if layout in ("export", "legacy", "codec"):
        write_audiocraft(folder, written, legacy=layout == "legacy")
        return folder, folder / ("compression_state_dict.bin" if layout == "codec" else "state_dict.bin"), {}
    if layout in ("safetensors", "bin", "config"):
        write_transformers(folder, written, form="bin" if layout == "bin" else "safetensors")
        names = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin", "config": "config.json"}
        return folder, folder / names[layout], {}
    base = write_transformers(folder / "base", written)
    if layout == "adapter":
        adapter = folder / "adapter"
        adapter.mkdir()
        stem = "base_model.model.decoder.lm_heads.0.lora_"
        save_file(
            {f"{stem}A.weight": torch.ones(2, 32), f"{stem}B.weight": torch.ones(64, 2)},
            adapter / "adapter_model.safetensors",
        )
        (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
        return base, adapter / "adapter_model.safetensors", {"adapter": adapter}
    path = folder / "last.ckpt"
    torch.save({"state_dict": {f"model.{k}": t for k, t in audiocraft_state(written).items()}}, path)
    return path, path, {"base": base}


LAYOUTS = ("export", "legacy", "codec", "safetensors", "bin", "config", "adapter", "lightning")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_truncated_at_200_places(tmp_path, layout):
    what, path, options = truncated(tmp_path, layout)
    whole = path.read_bytes()
    load_checkpoint(what, **options)
    draw = random.Random(0)
    cuts = {draw.randrange(len(whole)) for _ in range(140)} | {draw.randrange(min(4096, len(whole))) for _ in range(60)}
    if layout == "config":
        cuts -= {len(whole.rstrip())}  # without its last line break it is whole
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(what, **options)
        assert str(path) in str(caught.value), cut


# ---- whatever a file may hold: an error of ours, or a model

JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
        st.sampled_from([0, -1, 1, 2**31, 10**400, 1e308, "???", "${a}", "${.}", [], {}, [[]]]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
# MUSICGEN_FAST_FUZZ=5000 searches for an hour, each time elsewhere
EXAMPLES = int(os.environ.get("MUSICGEN_FAST_FUZZ", "0"))
QUICK = settings(
    max_examples=EXAMPLES or 60,
    deadline=2000,
    derandomize=not EXAMPLES,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def paths(tree: Any, start: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a configuration."""
    if not isinstance(tree, dict):
        return [start]
    return [start, *(path for key in tree for path in paths(tree[key], (*start, key)))]


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    return {**tree, path[0]: put(tree[path[0]], path[1:], value)}


def load_or_refuse(what: Path, **options: Any) -> None:
    try:
        load_checkpoint(what, **options)
    except CheckpointError as error:
        assert len(str(error)) < 5000


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return write_transformers(tmp_path_factory.mktemp("hf"), tiny("melody", num_layers=1))


@pytest.fixture(scope="module")
def ac(tmp_path_factory):
    return write_audiocraft(tmp_path_factory.mktemp("ac"), tiny("style", num_layers=1))


@QUICK
@given(data=st.data())
def test_any_value_in_config_json(hf, data):
    path = hf / "config.json"
    whole = path.read_text()
    tree = json.loads(whole)
    changed = put(tree, data.draw(st.sampled_from(paths(tree))), data.draw(JSON))
    try:
        path.write_text(json.dumps(changed))
        load_or_refuse(hf)
    finally:
        path.write_text(whole)


@QUICK
@given(data=st.data(), file=st.sampled_from(["state_dict.bin", "compression_state_dict.bin"]))
def test_any_value_in_xp_cfg(ac, data, file):
    path = ac / file
    whole = path.read_bytes()
    written = tiny("style", num_layers=1)
    tree = xp_cfg(written) if file == "state_dict.bin" else codec_xp_cfg(written.codec_config)
    changed = put(tree, data.draw(st.sampled_from(paths(tree))), data.draw(JSON))
    try:
        torch.save({**torch.load(path), "xp.cfg": yaml.safe_dump(changed, allow_unicode=True)}, path)
        load_or_refuse(ac)
    finally:
        path.write_bytes(whole)


@QUICK
@given(data=st.data())
def test_any_value_in_adapter_config_json(hf, tmp_path_factory, data):
    adapter = tmp_path_factory.mktemp("adapter")
    stem = "base_model.model.decoder.lm_heads.0.lora_"
    save_file(
        {f"{stem}A.weight": torch.ones(2, 32), f"{stem}B.weight": torch.ones(64, 2)},
        adapter / "adapter_model.safetensors",
    )
    tree: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"lm_heads.0": 2}}
    tree |= {"alpha_pattern": {"x": 1}, "use_dora": False, "init_lora_weights": True, "bias": "none"}
    changed = put(tree, data.draw(st.sampled_from(paths(tree))), data.draw(JSON))
    (adapter / "adapter_config.json").write_text(json.dumps(changed))
    load_or_refuse(hf, adapter=adapter)


@QUICK
@given(patterns=st.dictionaries(st.text(alphabet="ab.*+?(|)[]{}\\d^$0_l", max_size=12), st.just(2), max_size=3))
@example(patterns={"(a|a)*b": 2})
@example(patterns={"\\": 2})
def test_any_pattern(hf, tmp_path_factory, patterns):
    adapter = tmp_path_factory.mktemp("adapter")
    stem = "base_model.model.decoder.lm_heads.0.lora_"
    save_file(
        {f"{stem}A.weight": torch.ones(2, 32), f"{stem}B.weight": torch.ones(64, 2)},
        adapter / "adapter_model.safetensors",
    )
    fields = {"peft_type": "LORA", "r": 2, "rank_pattern": patterns, "alpha_pattern": patterns}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    load_or_refuse(hf, adapter=adapter)


@QUICK
@given(data=st.data())
def test_any_change_of_a_pickle(ac, data):
    """The archive is sound and the pickle in it is not: what a checksum cannot see."""
    path = ac / "state_dict.bin"
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    (name,) = (name for name in entries if name.endswith("data.pkl"))
    content = bytearray(entries[name])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content) - 1))
        content[start : start + data.draw(st.integers(0, 6))] = data.draw(st.binary(max_size=6))
    try:
        with zipfile.ZipFile(path, "w") as archive:
            for each, old in entries.items():
                archive.writestr(each, bytes(content) if each == name else old)
        load_or_refuse(ac)
    finally:
        path.write_bytes(whole)


@QUICK
@given(data=st.data())
def test_any_change_of_a_safetensors_header(hf, data):
    path = hf / "model.safetensors"
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, size + 8))
        new = data.draw(st.binary(max_size=6))
        content[start : start + len(new)] = new
    try:
        path.write_bytes(bytes(content))
        load_or_refuse(hf)
    finally:
        path.write_bytes(whole)


@QUICK
@given(data=st.data())
def test_any_type_and_shape_of_a_tensor(hf, data):
    path = hf / "model.safetensors"
    whole = path.read_bytes()
    tensors = load_file(path)
    name = data.draw(st.sampled_from(sorted(tensors)))
    dtype = data.draw(
        st.sampled_from([torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8, torch.bfloat16])
    )
    shape = data.draw(st.lists(st.integers(0, 3), max_size=5))
    if data.draw(st.booleans()):
        tensors[name] = torch.zeros(shape, dtype=dtype)
    else:
        tensors[name] = tensors[name].to(dtype)
    try:
        save_file(tensors, path)
        load_or_refuse(hf)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "field", [{"dropout_rate": "x"}, {"num_heads": 3, "d_kv": []}, {"dense_act_fn": 7, "feed_forward_proj": 7}]
)
def test_a_text_encoder_that_cannot_be_built(tmp_path, field):
    folder = write_transformers(tmp_path, tiny())
    edit_json(folder / "config.json", "text_encoder", **field)
    with pytest.raises(CheckpointError, match="text_encoder|text encoder"):
        MusicGen.get_pretrained(folder, "cpu")


def test_damaged_vocabularies(tmp_path):
    path = write_transformers(tmp_path, tiny(num_layers=1)) / "spiece.model"
    whole, draw, refusals = path.read_bytes(), random.Random(0), 0
    for _ in range(60):
        content = bytearray(whole[: draw.randrange(len(whole))] if draw.random() < 0.3 else whole)
        for _ in range(3):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)
        try:
            MusicGen.get_pretrained(tmp_path, "cpu")
        except CheckpointError:
            refusals += 1
    assert refusals > 10
