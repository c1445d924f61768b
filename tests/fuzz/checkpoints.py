"""Coverage-guided fuzzing of the checkpoint loaders: any bytes give a model or a CheckpointError, never another error.

    pip install atheris
    python -m tests.fuzz.checkpoints CORPUS -max_total_time=600 -max_len=16384 -timeout=5

The first byte of an input picks the part of a checkpoint that the others replace. CORPUS is a folder, made if need be,
that starts with the real content of each part. Not run by pytest: libFuzzer runs until it is told to stop.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import torch
import torch._weights_only_unpickler
from safetensors.torch import save_file

from tests.checkpoint_writers import audiocraft_state, tiny, write_audiocraft, write_transformers

with atheris.instrument_imports(include=["musicgen_fast.checkpoints"]):
    for _name in [name for name in sys.modules if name.startswith("musicgen_fast.checkpoints")]:
        del sys.modules[_name]
    from musicgen_fast.checkpoints import load_checkpoint
    from musicgen_fast.errors import CheckpointError

Replace = Callable[[bytes], None]


class Parts:
    """A sound checkpoint of every shape, and how each of its parts is replaced."""

    def __init__(self, root: Path) -> None:
        written = tiny(num_layers=1)
        self.hf = write_transformers(root / "hf", written)
        self.ac = write_audiocraft(root / "ac", written)
        self.adapter = root / "adapter"
        self.adapter.mkdir()
        stem = "base_model.model.decoder.lm_heads.0.lora_"
        factors = {f"{stem}A.weight": torch.ones(2, 32), f"{stem}B.weight": torch.ones(64, 2)}
        save_file(factors, self.adapter / "adapter_model.safetensors")
        (self.adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "rank_pattern": {"x": 1}}')
        self.single = root / "lm.pt"
        torch.save(audiocraft_state(written), self.single)
        self.seeds: list[bytes] = []
        self.tries: list[tuple[Replace, Any, dict[str, Any]]] = []
        for path in (self.hf / "config.json", self.hf / "model.safetensors", self.hf / "generation_config.json"):
            self._file(path, self.hf)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            self._file(self.adapter / name, self.hf, adapter=self.adapter)
        for name in ("state_dict.bin", "compression_state_dict.bin"):
            self._file(self.ac / name, self.ac)
            self._pickle(self.ac / name, self.ac)
            self._yaml(self.ac / name, self.ac)
        self._pickle(self.single, self.single, base=self.hf)

    def _add(self, seed: bytes, path: Path, replace: Replace, what: Path, options: dict[str, Any]) -> None:
        whole = path.read_bytes()

        def replaced(content: bytes) -> None:
            try:
                replace(content)
                load_checkpoint(what, **options)
            finally:
                path.write_bytes(whole)

        self.seeds.append(bytes([len(self.tries)]) + seed)
        self.tries.append((replaced, what, options))

    def _file(self, path: Path, what: Path, **options: Any) -> None:
        """The start of a file, of a safetensors file its header; what comes behind stays."""
        whole = path.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little") if path.suffix == ".safetensors" else min(len(whole), 4096)

        def replace(content: bytes) -> None:
            path.write_bytes(content + whole[start:])

        self._add(whole[:start], path, replace, what, options)

    def _pickle(self, path: Path, what: Path, **options: Any) -> None:
        """The pickle inside a zip file, whose checksums stay right."""
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        (name,) = (name for name in entries if name.endswith("data.pkl"))

        def replace(content: bytes) -> None:
            with zipfile.ZipFile(path, "w") as archive:
                for each, old in entries.items():
                    archive.writestr(each, content if each == name else old)

        self._add(entries[name], path, replace, what, options)

    def _yaml(self, path: Path, what: Path) -> None:
        package = torch.load(path)

        def replace(content: bytes) -> None:
            torch.save({**package, "xp.cfg": content.decode("utf-8", "replace")}, path)

        self._add(package["xp.cfg"].encode(), path, replace, what, {})


def main() -> None:
    corpus = Path(next((a for a in sys.argv[1:] if not a.startswith("-")), "corpus"))
    with tempfile.TemporaryDirectory() as root:
        parts = Parts(Path(root))
        corpus.mkdir(parents=True, exist_ok=True)
        for i, seed in enumerate(parts.seeds):
            (corpus / f"seed-{i}").write_bytes(seed)

        def one(data: bytes) -> None:
            if data:
                try:
                    parts.tries[data[0] % len(parts.tries)][0](data[1:])
                except CheckpointError:
                    pass

        atheris.instrument_func(one)
        atheris.Setup(sys.argv, one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
