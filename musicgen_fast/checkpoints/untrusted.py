"""Reading a training `checkpoint.th`: a pickle of live objects, which may run anything. Only here, only when asked to.

The pickle is read in a child process that gives up what it does not need before it starts, and hands back tensors
(safetensors) and a configuration (JSON), which the parent reads and checks like any file. `guarantees` says what held:

- on Linux (x86-64, arm64) the kernel refuses the child sockets, connections, new processes and signals to others (a
  seccomp filter), and where user namespaces are allowed it has no network at all;
- elsewhere only Python's own ways to these are closed, which code written for the purpose gets around;
- everywhere: limits on memory, file size and time, and an environment without the variables of the parent.

Never guaranteed: the child runs with the user's rights on files, and can read and delete what the user can.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import pickle
import platform
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

log = logging.getLogger(__name__)

__all__ = ["open_training_checkpoint", "sandbox"]

_SECONDS = 1800  # of processor time; a checkpoint of 40 GB takes one or two minutes
# system calls that reach beyond the process, by machine: AUDIT_ARCH, numbers to refuse, the number of clone
_SYSCALLS = {
    "x86_64": (
        0xC000003E,
        (41, 42, 43, 44, 49, 50, 53, 57, 58, 59, 62, 101, 129, 200, 234, 297, 310, 311, 322, 424, 425, 434, 438),
        56,
    ),
    "aarch64": (
        0xC00000B7,
        (117, 129, 130, 131, 138, 198, 199, 200, 201, 202, 203, 206, 221, 240, 270, 271, 281, 424, 425, 434, 438),
        220,
    ),
}
_CLOSED_EVENTS = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "ctypes.")


def open_training_checkpoint(
    name: str | os.PathLike[str],
    folder: Path,
    text_encoder: str | os.PathLike[str] | None = None,
    cache_dir: str | None = None,
) -> Any:
    """The `inspect.OnDisk` of a training checkpoint; `folder` (made here) holds its tensors, and must stay while used.

    Args:
        name: `checkpoint.th`, or the folder with it; the codec may lie beside, as in an export.

    Raises:
        CheckpointError: no such file, or the child could not read it.
    """
    import yaml

    from .files import TensorFiles, check_is_weights, read_json
    from .inspect import Opener
    from .sources import LocalFolder
    from .xp_config import parse_config

    path = Path(name).expanduser()
    path = path / "checkpoint.th" if path.is_dir() else path
    check_is_weights(path)
    folder.mkdir()
    for line in _run_child(path, folder):
        log.warning("%s", line)
    config = read_json(folder / "config.json")
    opener = Opener(LocalFolder(path.parent), strict=True)
    opener.name, opener.text_encoder, opener.cache_dir = str(path), text_encoder, cache_dir
    tensors = TensorFiles.from_file(folder / "model.safetensors")
    raw = yaml.safe_dump(config, sort_keys=False)
    return opener._audiocraft(tensors, parse_config(config, f"{path}: xp.cfg"), raw)


def _run_child(path: Path, folder: Path) -> list[str]:
    """Runs this module as a program; the lines that it printed."""
    kept = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "LANG")
    environment = {key: os.environ[key] for key in kept if key in os.environ}
    package = str(Path(__file__).resolve().parents[2])  # the child's working folder is not the caller's
    environment["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HOME=str(folder), TMPDIR=str(folder))
    command = [sys.executable, "-m", __name__, str(path.resolve()), str(folder.resolve())]
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=2 * _SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"{path} could not be read within {2 * _SECONDS} s; the child was stopped") from error
    lines = [line for line in done.stdout.decode(errors="replace").splitlines() if line.startswith("child: ")]
    lines = [line.removeprefix("child: ") for line in lines]
    if done.returncode != 0:
        told = done.stderr.decode(errors="replace").strip().splitlines() or [f"it ended with {done.returncode}"]
        raise CheckpointError(f"{path} could not be read in the child process: {told[-1][:300]}")
    return lines


# ---- in the child


def sandbox(size: int) -> list[str]:
    """Gives up network, processes, signals and resources for good; what held, in sentences.

    Args:
        size: bytes of the file to be read.
    """
    held = _limit(size)
    if sys.platform == "linux" and _filter_system_calls():
        held.append("the kernel refuses it sockets, new processes and signals")
    else:
        held.append("NOT enforced by the kernel here: only Python's own sockets and programs are closed to it")
    sys.addaudithook(_refuse_event)
    return held


def leave_network() -> list[str]:
    """A network namespace of its own, without any device. Linux asks for a single thread: torch has none yet."""
    if sys.platform != "linux":
        return []
    new_user, new_network = 0x10000000, 0x40000000
    left = ctypes.CDLL(None, use_errno=True).unshare(new_user | new_network) == 0
    return ["it has no network"] if left else []


def _limit(size: int) -> list[str]:
    try:
        import resource
    except ImportError:  # Windows
        return ["NO limits on memory and time on this system"]
    wanted = {
        resource.RLIMIT_CPU: _SECONDS,
        resource.RLIMIT_FSIZE: 2 * size + (64 << 20),
        resource.RLIMIT_AS: 3 * size + (16 << 30),  # mapped files and torch's libraries count
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in wanted.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    return ["its memory, file size and time are limited"]


def _refuse_event(event: str, args: tuple[Any, ...]) -> None:
    if event.startswith(_CLOSED_EVENTS):
        raise PermissionError(f"{event} is closed to a checkpoint")


def _filter_system_calls() -> bool:
    """A seccomp filter for all threads: `_SYSCALLS` fail with EPERM, other architectures' calls end the process."""
    known = _SYSCALLS.get(platform.machine())
    if known is None or sys.maxsize < 1 << 32:
        return False
    arch, refused, clone = known
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, unknown, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    tests = [(at_least, 0x40000000), *((equal, number) for number in refused)]  # x32 calls have numbers of their own
    program = [(load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, kill), (load, 0, 0, 0)]
    program += [(code, len(tests) - i + 4, 0, number) for i, (code, number) in enumerate(tests)]
    # threads, but no processes; clone3 hides its flags from the filter: libraries go back to clone where it is unknown
    program += [(equal, 5, 0, 435), (equal, 0, 2, clone), (load, 0, 0, 16), (any_bit, 0, 1, 0x10000)]
    program += [(give, 0, 0, allow), (give, 0, 0, refuse), (give, 0, 0, unknown)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in program))
    head = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_filter_mode, all_threads = 38, 1, 1
    seccomp = {"x86_64": 317, "aarch64": 277}[platform.machine()]
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) != 0:
        return False
    return libc.syscall(seccomp, set_filter_mode, all_threads, ctypes.c_char_p(head)) == 0


class _Forgiving(pickle.Unpickler):
    """OmegaConf and classes that are not installed become `Inert`: only tensors and the configuration are wanted."""

    def find_class(self, module: str, name: str) -> Any:
        from .pickled import Inert

        if module.split(".")[0] == "omegaconf":
            return Inert
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return Inert


def _extract(package: Mapping[str, Any]) -> tuple[Mapping[str, Any], Any]:
    """(tensors, configuration) of audiocraft's solver: the best state, gathered where it was sharded."""
    for key in ("fsdp_best_state", "best_state", "model"):
        state = package.get(key)
        state = state.get("model", state) if isinstance(state, Mapping) else None
        if state:
            return state, package.get("xp.cfg")
    raise CheckpointError(f"no best_state or model in it, only {', '.join(map(repr, list(package)[:6]))}")


def _child(path: Path, folder: Path) -> None:
    held = leave_network()
    import torch

    from .entries import Entry, write_safetensors
    from .pickled import plain_config

    torch.set_num_threads(1)
    held += sandbox(path.stat().st_size)
    print("child: reading the pickle in a process of its own: " + "; ".join(held), flush=True)
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    reader: Any = type("reader", (), {"Unpickler": _Forgiving, "load": pickle.load, "__name__": "reader"})
    package = torch.load(path, map_location="cpu", weights_only=False, mmap=is_zip, pickle_module=reader)
    state, config = _extract(package)
    entries = []
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor):
            flat = name.replace("_attn.mha.", "_attn.").replace("cross_attention.mha.", "cross_attention.")
            entries.append(Entry.of(flat, tensor.detach()))
    config = plain_config(config)
    write_safetensors(folder / "model.safetensors", entries)
    (folder / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")


if __name__ == "__main__":
    try:
        _child(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
