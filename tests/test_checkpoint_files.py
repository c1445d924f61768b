"""Files that are wrong, truncated or hostile: one clear error each, nothing executed, nothing half loaded."""

from __future__ import annotations

import collections
import json
import os
import pickle
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch

from musicgen_fast.checkpoints import CheckpointError, load_checkpoint
from musicgen_fast.checkpoints.pickled import load_pickle

from .checkpoint_writers import (
    refused,
    tiny,
    write_audiocraft,
    write_transformers,
)


@pytest.fixture(scope="module")
def checkpoint():
    return tiny()


@pytest.fixture
def exported(tmp_path, checkpoint) -> Path:
    return write_audiocraft(tmp_path, checkpoint)


@pytest.fixture
def saved(tmp_path, checkpoint) -> Path:
    return write_transformers(tmp_path, checkpoint)


WRONG = {
    "empty": (b"", "empty (0 bytes)"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 841000000\n", "git-lfs pointer"),
    "page": (b"<!DOCTYPE html>\n<html><title>404</title></html>", "web page"),
    "text": (b"Entry not found", "text file (it starts with 'Entry not found')"),
    "noise": (bytes(range(256)) * 8, "download it again"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize(
    "file", ["state_dict.bin", "compression_state_dict.bin", "model.safetensors", "pytorch_model.bin"]
)
def test_wrong_files_are_named_for_what_they_are(tmp_path, checkpoint, file, kind):
    content, words = WRONG[kind]
    audiocraft = "state_dict" in file
    folder = write_audiocraft(tmp_path, checkpoint) if audiocraft else write_transformers(tmp_path, checkpoint)
    if file == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(content)
    refused(folder, str(folder / file), words)


@pytest.mark.parametrize("file", ["state_dict.bin", "compression_state_dict.bin", "model.safetensors"])
def test_truncated_at_any_place(tmp_path, checkpoint, file):
    audiocraft = "state_dict" in file
    folder = write_audiocraft(tmp_path, checkpoint) if audiocraft else write_transformers(tmp_path, checkpoint)
    whole = (folder / file).read_bytes()
    cuts = [1, 7, 8, 9, 100, len(whole) // 3, len(whole) // 2, len(whole) - 1000, len(whole) - 1]
    for cut in cuts:
        (folder / file).write_bytes(whole[:cut])
        refused(folder, str(folder / file))


def test_truncated_old_format(tmp_path, checkpoint):
    folder = write_audiocraft(tmp_path, checkpoint, legacy=True)
    path = folder / "state_dict.bin"
    whole = path.read_bytes()
    for cut in range(10, len(whole), len(whole) // 12):
        path.write_bytes(whole[:cut])
        refused(folder, str(path))


@pytest.mark.parametrize("header", ["size", "json", "overlap", "short"])
def test_safetensors_with_a_bad_header(saved, header):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    fields = json.loads(content[8 : 8 + size])
    if header == "size":
        content = (2**60).to_bytes(8, "little") + content[8:]
    elif header == "json":
        content = content[:8] + b"x" * size + content[8 + size :]
    else:
        name = next(n for n in fields if n != "__metadata__")
        fields[name]["data_offsets"] = [0, 4] if header == "short" else [0, 10**12]
        text = json.dumps(fields).encode()
        content = len(text).to_bytes(8, "little") + text + content[8 + size :]
    path.write_bytes(content)
    refused(saved, str(path), "safetensors")


# ---- pickles that want to run something


class Bomb:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def bombs(marker: Path) -> dict[str, object]:
    command = f"touch {marker}"
    return {
        "os.system": Bomb(os.system, command),
        "eval": Bomb(eval, f"__import__('os').system({command!r})"),
        "exec": Bomb(exec, f"open({str(marker)!r}, 'w')"),
        "getattr": Bomb(getattr, "x", "upper"),
        "open": Bomb(open, str(marker), "w"),
        "torch.load": Bomb(torch.load, str(marker)),
        "numpy.load": Bomb(np.load, str(marker)),
    }


@pytest.mark.parametrize("name", ["os.system", "eval", "exec", "getattr", "open", "torch.load", "numpy.load"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(exported, tmp_path, name, zipped):
    marker = tmp_path / "executed"
    path = exported / "state_dict.bin"
    package = torch.load(path)
    package["extra"] = bombs(marker)[name]
    torch.save(package, path, _use_new_zipfile_serialization=zipped)
    message = refused(exported, str(path), "nothing in it was run")
    assert any(part in message for part in (name.split(".")[-1], "posix"))
    assert not marker.exists()


def test_allowed_stand_ins_run_nothing_either(tmp_path):
    """The names on the allow list are inert: calling them, or setting their state, has no effect."""
    path = tmp_path / "x.bin"
    before = set(torch.serialization.get_safe_globals())  # torch keeps a set: the order of its list means nothing
    torch.save({"a": Bomb(PurePosixPath, "x"), "b": np.float64(3.5), "c": np.dtype("float32")}, path)
    loaded = load_pickle(path)
    assert {type(value).__name__ for value in loaded.values()} == {"Inert"}
    assert set(torch.serialization.get_safe_globals()) == before


def test_a_plain_pickle_is_not_a_checkpoint(exported):
    (exported / "state_dict.bin").write_bytes(pickle.dumps({"best_state": {}}, protocol=2))
    refused(exported, "state_dict.bin")


def test_pickled_omegaconf_configuration(exported, checkpoint):
    """Early files hold the configuration as OmegaConf objects instead of YAML; neither package is imported for them."""
    omegaconf = pytest.importorskip("omegaconf", reason="makes the file under test")
    path = exported / "state_dict.bin"
    package = torch.load(path)
    config = omegaconf.OmegaConf.create(package["xp.cfg"])
    config.merge_with({"extra": {"where": Path("/tmp"), "listed": [1, {"two": 2.5}], "none": None}})
    package["xp.cfg"] = config
    package["history"] = [{"loss": np.float64(1.5), "counts": collections.defaultdict(dict, a=1)}]
    torch.save(package, path)
    loaded = load_checkpoint(exported)
    assert loaded.config == checkpoint.config
    assert loaded.xp_cfg["extra"]["listed"] == [1, {"two": 2.5}]
    assert loaded.xp_cfg["generate"]["audio"]["sample_rate"] == 32000  # an interpolation, resolved


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_archives_are_refused(exported):
    module = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    module.save(str(exported / "state_dict.bin"))
    refused(exported, "state_dict.bin", "TorchScript", "not run")


def test_zip_of_something_else(exported):
    with zipfile.ZipFile(exported / "state_dict.bin", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(exported, "state_dict.bin", "download it again")


@pytest.mark.parametrize("file", ["state_dict.bin", "compression_state_dict.bin", "model.safetensors", "config.json"])
def test_damaged_files_load_or_are_refused(tmp_path, file):
    """Bytes changed at random where the structure of a file is: never another exception than CheckpointError."""
    write = write_audiocraft if "state_dict" in file else write_transformers
    path = write(tmp_path, tiny(num_layers=1)) / file
    whole = path.read_bytes()
    start = max(whole.find(b"data.pkl"), 0)
    random = np.random.default_rng(0)
    refusals = 0
    for _ in range(40):
        damaged = bytearray(whole)
        for place in random.integers(start, min(start + 9000, len(whole)), size=3):
            damaged[place] = random.integers(256)
        path.write_bytes(damaged)
        try:
            load_checkpoint(tmp_path)
        except CheckpointError:
            refusals += 1
    assert refusals > 10
