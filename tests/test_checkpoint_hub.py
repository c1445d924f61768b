"""Hub repositories without a network: a recorded `hf_hub_download`, a cache made by hand, and the errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from musicgen_fast.checkpoints import CheckpointError, load_checkpoint

from .checkpoint_writers import tiny, write_audiocraft, write_encodec, write_t5, write_transformers

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """`hf_hub_download` over folders: repositories by name; `online=False` is a hub that does not answer."""

    def __init__(self, root: Path):
        self.root, self.online = root, True
        self.fetched: list[str] = []
        self.asked: list[dict] = []

    def folder(self, repo: str) -> Path:
        return self.root / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT

    def __call__(self, repo_id: str, filename: str, **options) -> str:
        self.asked.append({"repo": repo_id, "file": filename, **options})
        if not self.online:
            raise LocalEntryNotFoundError("no connection")
        if not self.folder(repo_id).is_dir():
            raise OSError(f"401 Client Error: {repo_id} not found")
        path = self.folder(repo_id) / filename
        if not path.is_file():
            raise EntryNotFoundError(f"404: {filename}")
        self.fetched.append(f"{repo_id}/{filename}")
        return str(path)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("AUDIOCRAFT_CACHE_DIR", raising=False)
    return hub


def test_only_the_files_of_one_layout_are_fetched(hub):
    """The small repository has everything twice and more: 11 GB for what 2.4 GB give."""
    written = tiny()
    folder = write_transformers(hub.folder("owner/model"), written)
    write_transformers(folder, written, form="bin")
    write_audiocraft(folder, written, text=False)
    (folder / "model.fp32.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").write_text("{}")
    loaded = load_checkpoint("owner/model")
    assert torch.equal(loaded.lm["emb.weight"], written.lm["emb.weight"])
    files = {name.rpartition("/")[2] for name in hub.fetched}
    assert files == {"config.json", "model.safetensors", "generation_config.json", "spiece.model"}
    assert {call["revision"] for call in hub.asked[1:]} == {COMMIT}


def test_sharded_and_old_repositories(hub):
    written = tiny()
    write_transformers(hub.folder("owner/sharded"), written, shards=3)
    write_transformers(hub.folder("owner/old"), written, form="bin", shards=2)
    for repo in ("owner/sharded", "owner/old"):
        assert torch.equal(load_checkpoint(repo).lm["heads.weight"], written.lm["heads.weight"])
    assert sum("-of-00003.safetensors" in name for name in hub.fetched) == 3


def test_audiocraft_repository_with_codec_and_text_elsewhere(hub):
    written = tiny("style")
    write_audiocraft(hub.folder("facebook/musicgen-style"), written, codec="facebook/encodec_32khz", text=False)
    write_encodec(hub.folder("facebook/encodec_32khz"), written)
    write_t5(hub.folder("google-t5/t5-base"), written)
    hub.folder("t5-base").mkdir(parents=True)  # an id that the hub knows, but without files in it
    with pytest.warns(UserWarning, match="facebook/musicgen-style"):
        loaded = load_checkpoint("style", revision="v1")
    assert loaded.name == "style" and loaded.style is not None
    assert loaded.text.tokenizer_folder == hub.folder("google-t5/t5-base")
    first = {call["repo"]: call["revision"] for call in reversed(hub.asked)}
    assert first == {
        "facebook/musicgen-style": "v1",
        "facebook/encodec_32khz": None,
        "t5-base": None,
        "google-t5/t5-base": None,
    }


@pytest.mark.parametrize("short", ["small", "medium", "large", "melody"])
def test_short_names(hub, short):
    with pytest.warns(UserWarning, match=f"facebook/musicgen-{short}"), pytest.raises(CheckpointError):
        load_checkpoint(short)
    assert hub.asked[0]["repo"] == f"facebook/musicgen-{short}"


def test_cache_folder(hub, tmp_path, monkeypatch):
    write_transformers(hub.folder("owner/model"), tiny())
    load_checkpoint("owner/model", cache_dir=tmp_path / "mine")
    assert {call["cache_dir"] for call in hub.asked} == {tmp_path / "mine"}
    hub.asked.clear()
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(tmp_path / "theirs"))
    load_checkpoint("owner/model")
    assert {call["cache_dir"] for call in hub.asked} == {str(tmp_path / "theirs")}


def test_audiocrafts_cache_variable_leaves_the_text_encoder_where_transformers_puts_it(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(tmp_path / "theirs"))
    write_audiocraft(hub.folder("owner/model"), tiny(), codec="owner/encodec", text=False)
    write_encodec(hub.folder("owner/encodec"), tiny())
    write_t5(hub.folder("t5-base"), tiny())
    load_checkpoint("owner/model")
    caches = {call["repo"]: call["cache_dir"] for call in hub.asked}
    assert caches == {"owner/model": str(tmp_path / "theirs"), "owner/encodec": None, "t5-base": None}


def test_no_network_is_noticed_once_and_explained(hub):
    hub.online = False
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint("owner/model")
    message = str(caught.value)
    for words in (
        "'owner/model'",
        "local cache",
        "config.json, state_dict.bin",
        "local folder",
        "hf download owner/model",
    ):
        assert words in message
    assert [call["local_files_only"] for call in hub.asked].count(False) == 1


def test_unknown_repository(hub):
    with pytest.raises(CheckpointError, match="'owner/nothing'.*401 Client Error.*local folder"):
        load_checkpoint("owner/nothing")


def test_repository_of_something_else(hub):
    hub.folder("owner/data").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="'owner/data' has no config.json or state_dict.bin"):
        load_checkpoint("owner/data")
    (hub.folder("owner/data") / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="LoRA adapter"):
        load_checkpoint("owner/data")


def test_missing_text_encoder_says_what_to_do(hub):
    write_audiocraft(hub.folder("owner/model"), tiny(), text=False)
    with pytest.raises(CheckpointError, match=r"'t5-base'.*text_encoder="):
        load_checkpoint("owner/model")


def test_missing_codec_says_what_to_do(hub, tmp_path):
    folder = write_audiocraft(tmp_path / "local", tiny(), codec="facebook/encodec_32khz")
    with pytest.raises(CheckpointError, match=r"compression_state_dict.bin points to.*encodec/ beside"):
        load_checkpoint(folder)
    write_encodec(folder / "compression_model", tiny())
    assert load_checkpoint(folder).codec_config.codebook_size == 64
    write_audiocraft(tmp_path / "dac", tiny(), codec="dac_44khz")
    with pytest.raises(CheckpointError, match="dac_44khz.*only EnCodec"):
        load_checkpoint(tmp_path / "dac")


def test_pointer_to_a_local_codec(tmp_path):
    written = tiny()
    whole = write_audiocraft(tmp_path / "whole", written)
    encodec = write_encodec(tmp_path / "codec", written)
    for target in (whole / "compression_state_dict.bin", encodec):
        folder = write_audiocraft(tmp_path / "pointer", written, codec=str(target))
        loaded = load_checkpoint(folder)
        assert loaded.codec.keys() == written.codec.keys()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", "neither an existing folder nor"),
        ("/nowhere/at/all", "neither an existing folder nor"),
        ("a/b/c", "neither an existing folder nor"),
        ("https://example.com/x", "URLs are not fetched"),
        ("", "neither an existing folder nor"),
        (Path("nowhere"), "neither an existing folder nor"),
    ],
)
def test_names_that_are_neither(hub, name, words):
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(name)
    assert not hub.asked


def test_a_file_of_a_folder_is_not_a_checkpoint(tmp_path):
    folder = write_transformers(tmp_path, tiny())
    with pytest.raises(CheckpointError, match="give the folder"):
        load_checkpoint(folder / "model.safetensors")
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="no config.json or state_dict.bin"):
        load_checkpoint(tmp_path / "other")
    (tmp_path / "other" / "checkpoint.th").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="audiocraft.utils.export"):
        load_checkpoint(tmp_path / "other")


def test_real_cache_offline(tmp_path, monkeypatch):
    """The hub's own library, on a cache laid out by hand, with HF_HUB_OFFLINE=1."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cache = tmp_path / "cache"
    written = tiny()
    for repo, write in (("owner/hf", write_transformers), ("owner/ac", write_audiocraft)):
        folder = cache / f"models--{repo.replace('/', '--')}"
        write(folder / "snapshots" / COMMIT, written)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
    t5 = cache / "models--google-t5--t5-base"
    shutil.copytree(cache / "models--owner--ac" / "snapshots" / COMMIT / "text_encoder", t5 / "snapshots" / COMMIT)
    (t5 / "refs").mkdir()
    (t5 / "refs" / "main").write_text(COMMIT)
    for repo in ("owner/hf", "owner/ac"):
        loaded = load_checkpoint(repo, cache_dir=cache)
        assert torch.equal(loaded.lm["emb.weight"], written.lm["emb.weight"])
        assert loaded.text.tokenizer_folder is not None
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        load_checkpoint("owner/other", cache_dir=cache)
