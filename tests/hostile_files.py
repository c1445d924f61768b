"""A corpus of hostile and broken checkpoints, and a child process that loads them under a limit of memory.

`python -m tests.hostile_files FOLDER` loads every case in FOLDER and prints one JSON line each: what was raised, after
how many seconds, and the highest use of memory so far. Run it where an escape would do no harm: in a test.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from musicgen_fast.checkpoints import CheckpointError, load_checkpoint

from .checkpoint_configs import edited, xp_cfg
from .checkpoint_writers import (
    audiocraft_state,
    edit_json,
    tiny,
    write_audiocraft,
    write_json,
    write_t5,
    write_transformers,
)

HEADROOM = 1 << 30  # bytes of address space that a child may take beyond what importing torch took


class Call:
    """Unpickles to the result of a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


# ---- pieces


def raw_pickle(path: Path, content: bytes, name: str = "archive/data.pkl", **options: Any) -> None:
    """A file in the form of torch.save's whose pickle is `content`."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr(name, content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


def change_state(folder: Path, change: Callable[[dict[str, Any]], None], file: str = "state_dict.bin") -> None:
    """Rewrites an exported file with its dict changed."""
    package = torch.load(folder / file)
    change(package)
    torch.save(package, folder / file)


def safetensors_file(path: Path, header: Any, data: bytes = b"", size: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + data)


def change_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    safetensors_file(path, header, content[8 + size :])


def sparse_file(path: Path, start: bytes, size: int) -> None:
    """`size` bytes on paper, a block on disk."""
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)


# ---- cases: each makes a checkpoint in an empty folder; the marker must never come to be


def pickles(marker: Path) -> dict[str, Callable[[Path], None]]:
    run = Call(os.system, f"touch {marker}")
    big = 10**11

    def exported(content: Any, key: str = "extra", file: str = "state_dict.bin", **options: Any) -> Any:
        def make(folder: Path) -> None:
            write_audiocraft(folder, tiny())
            package = {**torch.load(folder / file), key: content}
            torch.save(package, folder / file, **options)

        return make

    def instruction(content: bytes, legacy: bool = False) -> Any:
        def make(folder: Path) -> None:
            write_audiocraft(folder, tiny())
            path = folder / "state_dict.bin"
            path.write_bytes(content) if legacy else raw_pickle(path, content)

        return make

    magic = b"".join(
        pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    )
    return {
        "code": exported(run),
        "code in an old file": exported(run, _use_new_zipfile_serialization=False),
        "code in the codec": exported(run, file="compression_state_dict.bin"),
        "code in the configuration": exported(run, key="xp.cfg"),
        "code by protocol 0": instruction(b"cos\nsystem\n(S'touch " + os.fsencode(marker) + b"'\ntR."),
        "code by INST": instruction(b"(S'touch " + os.fsencode(marker) + b"'\nios\nsystem\n."),
        "code by STACK_GLOBAL": instruction(pickle.dumps(run, protocol=4)),
        "code by an extension": instruction(b"\x80\x02\x82\x01."),
        "code in the magic number": instruction(pickle.dumps(run, protocol=2), legacy=True),
        "code in the keys": instruction(magic + pickle.dumps({}, 2) + pickle.dumps(run, protocol=2), legacy=True),
        "getattr": exported(Call(getattr, "x", "upper")),
        "a function of torch": exported(Call(torch.zeros, big)),
        "memory by bytearray": exported(Call(bytearray, big)),
        "memory by a tensor": exported(Call(torch.FloatTensor, big)),
        "memory by a storage": exported(Call(torch.UntypedStorage, big)),
        "a sparse tensor": exported(torch.ones(2, 2).to_sparse()),
        "a quantized tensor": exported(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), key="best_state"),
        "a long pickle": instruction(b"\x80\x02" + b"]0" * (1 << 20) + b"N."),
        "a deep pickle": instruction(b"\x80\x02" + b"(" * 200_000 + b"l" * 200_000 + b"."),
        "a pickle that doubles": exported(doubling(60), key="xp.cfg"),
        "a pickle that doubles as state": exported(doubling(60), key="best_state"),
        "a pickle that doubles as pointer": exported(doubling(60), key="pretrained", file="compression_state_dict.bin"),
        "a long string": instruction(b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"x."),
        "an empty pickle": instruction(b""),
        "no end": instruction(b"\x80\x02]"),
    }


def doubling(levels: int) -> Any:
    node: Any = ["x"]
    for _ in range(levels):
        node = [node, node]
    return node


def archives() -> dict[str, Callable[[Path], None]]:
    def bomb(folder: Path) -> None:
        raw_pickle(
            folder / "state_dict.bin", b"\x80\x02" + b"]0" * (64 << 20) + b"N.", compression=zipfile.ZIP_DEFLATED
        )

    def storage_bomb(folder: Path) -> None:
        write_audiocraft(folder, tiny())
        path = folder / "state_dict.bin"
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in entries.items():
                archive.writestr(name, bytes(128 << 20) if name.endswith("data/0") else content)

    def shared(folder: Path) -> None:
        """Many entries that are the same bytes: the list of entries is repeated."""
        write_audiocraft(folder, tiny())
        path = folder / "state_dict.bin"
        with zipfile.ZipFile(path, "a") as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
            for i in range(2000):
                twin = zipfile.ZipInfo(f"archive/data/{i + 10**6}")
                twin.header_offset, twin.CRC = largest.header_offset, largest.CRC
                twin.compress_size = twin.file_size = largest.file_size
                archive.filelist.append(twin)
            archive._didModify = True  # type: ignore[attr-defined]

    def long_list(folder: Path) -> None:
        size = 100 << 20
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, size - 22, 0, 0)
        sparse_file(folder / "state_dict.bin", b"PK\3\4", size - 22)
        with open(folder / "state_dict.bin", "ab") as file:
            file.write(end)

    def twice(folder: Path) -> None:
        write_audiocraft(folder, tiny())
        with zipfile.ZipFile(folder / "state_dict.bin", "a") as archive:
            archive.writestr("other/DATA.PKL", pickle.dumps({}, 2))

    def nothing(folder: Path) -> None:
        with zipfile.ZipFile(folder / "state_dict.bin", "w"):
            pass

    return {
        "zip bomb": bomb,
        "zip bomb in a tensor": storage_bomb,
        "entries that share bytes": shared,
        "a long list of entries": long_list,
        "two pickles": twice,
        "an empty archive": nothing,
        "zeros": lambda folder: sparse_file(folder / "state_dict.bin", b"", 1 << 30),
        "zeros in an archive": lambda folder: sparse_file(folder / "state_dict.bin", b"PK\3\4", 1 << 30),
    }


def headers() -> dict[str, Callable[[Path], None]]:
    def saved(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            write_transformers(folder, tiny())
            change_header(folder / "model.safetensors", change)

        return make

    def with_file(make_file: Callable[[Path], None]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            write_transformers(folder, tiny())
            make_file(folder / "model.safetensors")

        return make

    def overlap(header: dict[str, Any]) -> None:
        names = [n for n in header if n != "__metadata__"]
        header[names[0]] = dict(header[names[1]])

    def set_first(**fields: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda header: header[next(n for n in header if n != "__metadata__")].update(fields)

    many = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)}
    return {
        "overlapping offsets": saved(overlap),
        "offsets beyond the end": saved(set_first(data_offsets=[0, 10**12])),
        "offsets backwards": saved(set_first(data_offsets=[100, 0])),
        "negative offsets": saved(set_first(data_offsets=[-4, 0])),
        "a shape that overflows": saved(set_first(shape=[2**32, 2**32])),
        "a shape of 2**64": saved(set_first(shape=[2**64])),
        "a type that is none": saved(set_first(dtype="F1000")),
        "a tensor without a shape": saved(lambda header: header[list(header)[-1]].clear()),
        "a header of 2**60": with_file(lambda path: safetensors_file(path, {}, size=2**60)),
        "a header of 99 MB": with_file(
            lambda path: sparse_file(path, (99 << 20).to_bytes(8, "little") + b"{", 120 << 20)
        ),
        "a header of brackets": with_file(lambda path: safetensors_file(path, b"[" * (4 << 20))),
        "a header of objects": with_file(lambda path: safetensors_file(path, b'{"a":' * (1 << 20))),
        "a header that is no object": with_file(lambda path: safetensors_file(path, b"[]")),
        "a header of tensors": with_file(lambda path: safetensors_file(path, many)),
        "no header": with_file(lambda path: path.write_bytes(b"\x08")),
    }


def configurations() -> dict[str, Callable[[Path], None]]:
    def field(section: str | None, **fields: Any) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            write_transformers(folder, tiny())
            edit_json(folder / "config.json", section, **fields)

        return make

    def text(content: str, file: str = "config.json") -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            write_transformers(folder, tiny())
            (folder / file).write_text(content)

        return make

    def xp(**changes: Any) -> Callable[[Path], None]:
        dotted = {name.replace("__", "."): value for name, value in changes.items()}
        return lambda folder: write_audiocraft(folder, tiny(), changes=dotted)

    def yaml_text(content: str) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            write_audiocraft(folder, tiny())
            change_state(folder, lambda package: package.update({"xp.cfg": content}))

        return make

    def absurd(folder: Path) -> None:
        """Every tensor is one number seen from everywhere, as large as the configuration says."""
        write_audiocraft(folder, tiny())
        cfg = edited(xp_cfg(tiny()), {"transformer_lm.dim": 1 << 15, "transformer_lm.num_heads": 1 << 9})
        one = torch.zeros(1)
        state = {
            name: one.expand([size * 1024 if size % 32 == 0 else size for size in tensor.shape])
            for name, tensor in audiocraft_state(tiny()).items()
        }
        torch.save({"best_state": state, "xp.cfg": yaml.safe_dump(cfg)}, folder / "state_dict.bin")

    def t5(**fields: Any) -> Callable[[Path], None]:
        return field("text_encoder", **fields)

    doubled = "\n".join(f"a{i}: &a{i} [{f'*a{i - 1}, *a{i - 1}' if i else 'x'}]" for i in range(60))
    sections = "\n".join(f"s{i}: {{l: '${{s{i + 1}}}', r: '${{s{i + 1}}}'}}" for i in range(60)) + "\ns60: {x: 1}"
    return {
        "absurd sizes in tensors": absurd,
        "absurd width": field("decoder", hidden_size=1 << 20, num_attention_heads=1 << 10),
        "absurd layers": field("decoder", num_hidden_layers=10**9),
        "absurd vocabulary": field("decoder", vocab_size=10**18, pad_token_id=10**18),
        "absurd codebooks": field("decoder", num_codebooks=10**9),
        "a width of 5000 digits": text('{"model_type": "musicgen", "decoder": {"hidden_size": ' + "9" * 5000 + "}}"),
        "a width of 400 digits": field("decoder", hidden_size=10**400),
        "an infinite width": field("decoder", hidden_size=float("inf")),
        "a width that is a list": field("decoder", hidden_size=[32]),
        "a special token that is a text": field("decoder", pad_token_id="x"),
        "a family that is a list": field(None, model_type=["musicgen"]),
        "absurd codec filters": field("audio_encoder", num_filters=10**9),
        "absurd codec blocks": field("audio_encoder", num_residual_layers=10**9),
        "absurd codec memory": field("audio_encoder", num_lstm_layers=10**9),
        "absurd codec strides": field("audio_encoder", upsampling_ratios=[1] * 10**5),
        "infinite codec bandwidth": field("audio_encoder", target_bandwidths=[float("inf")]),
        "absurd codec bandwidth": field("audio_encoder", target_bandwidths=[1e300]),
        "infinite codec rate": field("audio_encoder", sampling_rate=float("inf")),
        "a codec of NaN": field("audio_encoder", kernel_size=float("nan")),
        "absurd text layers": t5(num_layers=10**9),
        "absurd text width": t5(d_model=1 << 20),
        "a window of 1e300 s": field(None, segment_duration=1e300),
        "a guidance of infinity": text('{"guidance_scale": Infinity}', "generation_config.json"),
        "deep JSON": text("[" * 500_000),
        "long JSON": text('{"a": [' + "1," * (3 << 20) + "1]}"),
        "wide JSON": text("[" + "{}," * (1 << 20) + "{}]"),
        "JSON of another encoding": text("\0\0\0"),
        "deep YAML": yaml_text("[" * 50_000),
        "long YAML": yaml_text("a: 1\n" * 1_000_000),
        "YAML that doubles": yaml_text(doubled),
        "YAML that runs code": yaml_text("a: !!python/object/apply:os.system ['false']"),
        "YAML of a bad date": yaml_text("a: 2001-99-99"),
        "YAML of 5000 digits": yaml_text("a: " + "9" * 5000),
        "a configuration that doubles": yaml_text(sections),
        "absurd hidden_scale": xp(transformer_lm__hidden_scale=float("inf")),
        "hidden_scale of NaN": xp(transformer_lm__hidden_scale=float("nan")),
        "absurd delays": xp(codebooks_pattern__delay__delays=[10**12] * 4),
        "a pattern without groups": xp(codebooks_pattern={"modeling": "musiclm", "musiclm": {"group_by": 0}}),
        "a scale that is a list": lambda folder: write_audiocraft(
            folder, tiny("style"), changes={"conditioners.self_wav.style.transformer_scale": []}
        ),
        "a condition that is a number": xp(conditioners={1: {}, "x": {}}),
        "a T5 of a long name": lambda folder: named_t5(folder, "x" * 5000),
        "a T5 of nobody": lambda folder: named_t5(folder, "~nobody-here/t5"),
        "a T5 of a zero byte": lambda folder: named_t5(folder, "a\0b"),
    }


def named_t5(folder: Path, name: str) -> None:
    write_audiocraft(folder, tiny(), changes={"conditioners.description.t5.name": name}, text=False)


def weights() -> dict[str, Callable[[Path], None]]:
    """Tensors of the right names and shapes with the wrong content, in each of the parts."""
    cases: dict[str, Callable[[Path], None]] = {}
    parts = {
        "model": "decoder.model.decoder.layers.1.fc2.weight",
        "norm": "decoder.model.decoder.layer_norm.bias",
        "text": "text_encoder.encoder.block.1.layer.0.SelfAttention.k.weight",
        "codec": "audio_encoder.quantizer.layers.1.codebook.embed",
    }
    wrong: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
        "NaN": lambda t: t.index_fill(0, torch.tensor([1]), float("nan")),
        "infinity": lambda t: t.index_fill(0, torch.tensor([1]), float("-inf")),
        "int8": lambda t: t.to(torch.int8),
        "bool": lambda t: t > 0,
        "float8": lambda t: t.to(torch.float8_e4m3fn),
        "complex": lambda t: t.to(torch.complex64),
        "no": lambda t: None,
        "flat": lambda t: t.reshape(1, -1),
        "empty": lambda t: t[:0],
    }

    def make(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            from safetensors.torch import load_file, save_file

            path = write_transformers(folder, tiny()) / "model.safetensors"
            tensors = load_file(path)
            changed = change(tensors.pop(name))
            save_file({**tensors, **({} if changed is None else {name: changed.contiguous()})}, path)

        return write

    for part, name in parts.items():
        cases |= {f"{kind} weights in the {part}": make(name, change) for kind, change in wrong.items()}

    def half_nan(folder: Path) -> None:
        write_audiocraft(folder, tiny(), half=True)
        change_state(folder, lambda p: p["best_state"]["emb.1.weight"].fill_(float("nan")))

    def extra(folder: Path) -> None:
        write_audiocraft(folder, tiny())
        change_state(folder, lambda p: p["best_state"].update({f"extra.{i}": torch.ones(1) for i in range(3000)}))

    def odd_key(folder: Path) -> None:
        write_audiocraft(folder, tiny())
        change_state(folder, lambda p: p["best_state"].update({(1, (2, 3)): torch.ones(1)}))

    return {**cases, "NaN in float16": half_nan, "extra tensors": extra, "a key that is no name": odd_key}


def links() -> dict[str, Callable[[Path], None]]:
    def link(file: str, target: str, layout: Callable[..., Any] = write_audiocraft) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            layout(folder, tiny())
            (folder / file).unlink()
            (folder / file).symlink_to(target)

        return make

    def special(file: str, create: Callable[[Path], Any]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            write_audiocraft(folder, tiny())
            (folder / file).unlink()
            create(folder / file)

        return make

    def shards(**weight_map: Any) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            write_transformers(folder, tiny())
            (folder / "model.safetensors").rename(folder / "a.safetensors")
            write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})

        return make

    def pointer(name: str) -> Callable[[Path], None]:
        return lambda folder: write_audiocraft(folder, tiny(), codec=name)

    return {
        "a link to itself": link("state_dict.bin", "state_dict.bin"),
        "a link to nowhere": link("state_dict.bin", "/nowhere/at/all"),
        "a link to a device": link("state_dict.bin", "/dev/zero"),
        "a link to a file of the system": link("state_dict.bin", "/etc/passwd"),
        "a link to another file": link("state_dict.bin", "compression_state_dict.bin"),
        "a linked configuration": link("config.json", "/dev/zero", write_transformers),
        "a folder for a file": special("state_dict.bin", Path.mkdir),
        "a pipe": special("state_dict.bin", os.mkfifo),
        "a pipe as codec": special("compression_state_dict.bin", os.mkfifo),
        "a shard above": shards(a="../a.safetensors"),
        "a shard of the system": shards(a="/etc/passwd"),
        "a shard of a zero byte": shards(a="a\0.safetensors"),
        "a shard of a long name": shards(a="a" * 5000),
        "shards that are numbers": shards(a=1),
        "a shard that lacks what it has": shards(nothing="a.safetensors"),
        "no shards": shards(),
        "a pointer to itself": pointer("compression_state_dict.bin"),
        "a pointer to a long name": pointer("x" * 5000),
        "a pointer to a zero byte": pointer("a\0b"),
        "a pointer to a device": pointer("/dev/zero"),
        "a pointer to above": pointer("../../../../../etc/passwd"),
    }


def corpus(marker: Path) -> dict[str, Callable[[Path], None]]:
    """Name -> what makes the case in a folder."""
    return {**pickles(marker), **archives(), **headers(), **configurations(), **weights(), **links()}


def write_corpus(root: Path, marker: Path) -> list[str]:
    """Every case in a folder of its own under `root`; their names."""
    cases = corpus(marker)
    for name, make in cases.items():
        folder = root / name
        folder.mkdir(parents=True)
        make(folder)
        if not (folder / "text_encoder").exists() and (folder / "state_dict.bin").exists() and "T5" not in name:
            write_t5(folder / "text_encoder", tiny())
    return list(cases)


def main(root: Path) -> None:
    """Loads each case under a limit of memory. The first line is a good one: it loads what is loaded lazily."""
    load_checkpoint(root / "good")
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for folder in sorted(root.iterdir()):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started, raised, message = time.process_time(), "", ""
        try:
            load_checkpoint(folder)
        except CheckpointError as error:
            raised, message = "CheckpointError", str(error)
        except BaseException as error:  # noqa: B036  the report is the point
            raised, message = type(error).__name__, str(error)[:500]
        seconds = time.process_time() - started
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        report = {"case": folder.name, "raised": raised, "message": message, "seconds": seconds, "grown": grown}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
