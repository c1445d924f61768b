"""Whether this installation works, and what it is: versions, compiled parts, processor, GPU, caches, a self-test.

`examine()` gathers plain data for a bug report. `problems` are what is broken, each with what to do; `notes` are what
is slower or smaller than it could be. Changes nothing, downloads nothing. The only private thing is a folder's name.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import __version__, native

__all__ = ["examine", "self_test"]

_NEEDED = ("torch", "numpy", "einops", "sentencepiece", "safetensors", "huggingface_hub", "transformers", "soundfile",
           "julius", "tqdm", "yaml")  # fmt: skip
_OPTIONAL = ("triton", "demucs", "ray", "peft", "audiocraft", "torchaudio", "protobuf")
_DISTRIBUTIONS = {"yaml": "PyYAML", "audiocraft": "tts-webui.audiocraft"}
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE",
              "TRANSFORMERS_OFFLINE", "AUDIOCRAFT_CACHE_DIR", "MUSICGEN_FAST_NATIVE", "MUSICGEN_FAST_SAMPLER",
              "MUSICGEN_FAST_DECODER", "MUSICGEN_FAST_CUDA", "MUSICGEN_FAST_KV", "MUSICGEN_FAST_FOLD",
              "MUSICGEN_FAST_PDL", "OMP_WAIT_POLICY", "TRITON_INTERPRET")  # fmt: skip
_LITTLE = 3e9  # bytes: musicgen-small in half precision, its T5, codec and a request


class _Findings:
    def __init__(self) -> None:
        self.problems: list[dict[str, str]] = []
        self.notes: list[dict[str, str]] = []

    def problem(self, what: str, do: str) -> None:
        self.problems.append({"what": what, "do": do})

    def note(self, what: str, do: str) -> None:
        self.notes.append({"what": what, "do": do})


def examine(*, with_self_test: bool = True) -> dict[str, Any]:
    """Everything above as JSON-ready data; `problems` is empty where all is well."""
    findings = _Findings()
    report: dict[str, Any] = {
        "musicgen_fast": __version__,
        "versions": _versions(findings),
        "system": _system(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "compiled": _compiled(findings),
        "gpu": _gpu(findings),
        "samplers": _samplers(findings),
        "memory": _memory(findings),
        "hub": _hub(findings),
    }
    report["self_test"] = self_test(findings.problem) if with_self_test else None
    return {**report, "problems": findings.problems, "notes": findings.notes}


def _versions(findings: _Findings) -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*_NEEDED, *_OPTIONAL):
        try:
            found[name] = metadata.version(_DISTRIBUTIONS.get(name, name))
        except metadata.PackageNotFoundError:
            found[name] = None
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except Exception as error:  # missing, or broken by another package's version
            package = _DISTRIBUTIONS.get(name, name)
            findings.problem(f"{name} cannot be imported ({_short(error)})", f"pip install --upgrade {package}")
    return found


def _system() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "processors": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "available_threads": native.extension().available_threads() if native.available() else None,
        "cgroup": {name: _read(Path("/sys/fs/cgroup", name)) for name in ("cpu.max", "memory.max")},
    }


def _processor() -> str:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _compiled(findings: _Findings) -> dict[str, Any]:
    reason = native.why_not()
    out: dict[str, Any] = {"extension": not reason, "why_not": reason or None}
    if reason:
        built = bool(list(Path(__file__).parent.glob("_C.*")))
        report = findings.problem if built and "MUSICGEN_FAST_NATIVE" not in reason else findings.note
        report("the C++ extension is not used: generation on a CPU is slower", reason)
    else:
        module = native.extension()
        out["linear"], out["attention"] = list(module.linear_isas()), list(module.attention_isas())
    if torch.cuda.is_available():
        reason = native.cuda_why_not(torch.device("cuda", 0))
        out["cuda_library"] = reason or True
    else:
        out["cuda_library"] = native.CUDA_LIBRARY.exists()
    return out


def _gpu(findings: _Findings) -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        if torch.version.cuda and Path("/dev/nvidiactl").exists():
            findings.problem(
                f"there is a GPU driver, but torch {torch.__version__} finds no GPU",
                "see whether nvidia-smi works, and install the torch that fits its CUDA version",
            )
        elif Path("/dev/nvidiactl").exists():
            findings.note(f"there is a GPU, but torch {torch.__version__} is built for CPUs", "install a CUDA torch")
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        devices.append({
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": total,
            "free": free,
            "cuda": torch.version.cuda,
        })  # fmt: skip
    return devices


def _samplers(findings: _Findings) -> dict[str, dict[str, str]]:
    """For each kind of device, each backend: 'yes', or why it cannot serve."""
    from .sampling.backends import BACKENDS, VARIABLE, choose, why_not

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    out = {d: {name: why_not(name, torch.device(d)) or "yes" for name in BACKENDS} for d in devices}
    try:
        for device in devices[-1:]:
            choose("auto", torch.device(device))
    except (ValueError, RuntimeError) as error:
        findings.problem(_short(error), f"unset {VARIABLE}, or set it to one that is listed as 'yes'")
    return out


def _memory(findings: _Findings) -> dict[str, Any]:
    """Bytes: of memory free for this process, and of disk free where temporary files go."""
    out: dict[str, Any] = {"free": None, "temporary_disk_free": None}
    for line in (_read(Path("/proc/meminfo")) or "").splitlines():
        if line.startswith("MemAvailable:"):
            out["free"] = 1024 * int(line.split()[1])
    limit, used = (_read(Path("/sys/fs/cgroup", name)) or "" for name in ("memory.max", "memory.current"))
    if out["free"] is not None and limit.isdecimal() and used.isdecimal():
        out["free"] = min(out["free"], max(int(limit) - int(used), 0))
    if out["free"] is not None and out["free"] < _LITTLE:
        findings.note(
            f"{out['free'] / 1e9:.1f} GB of memory are free: too little for musicgen-small",
            "close other programs, or raise the container's limit; the model 'demo' needs 0.3 GB",
        )
    import tempfile

    out["temporary_disk_free"] = shutil.disk_usage(tempfile.gettempdir()).free
    return out


def _hub(findings: _Findings) -> dict[str, Any]:
    """The hub's cache: where, what of MusicGen is in it, and whether a model fits."""
    try:
        from huggingface_hub import constants
    except Exception:  # reported with the versions
        return {}
    cache = Path(os.environ.get("AUDIOCRAFT_CACHE_DIR") or constants.HF_HUB_CACHE)
    there = cache
    while not there.exists() and there != there.parent:
        there = there.parent
    free = shutil.disk_usage(there).free
    models = [path.name.removeprefix("models--").replace("--", "/") for path in sorted(cache.glob("models--*"))]
    if not os.access(there, os.W_OK):
        findings.problem(f"the hub's cache {cache} cannot be written", "give its owner's rights, or set HF_HOME")
    elif free < _LITTLE:
        findings.note(f"{free / 1e9:.1f} GB are free where the hub's cache is", f"make room at {there}, or set HF_HOME")
    wanted = ("musicgen", "audiogen", "t5", "encodec", "mert")
    listed = [name for name in models if any(word in name.casefold() for word in wanted)]
    offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")
    return {"cache": str(cache), "free": free, "models": listed, "offline": bool(offline and offline != "0")}


def self_test(problem: Any = lambda what, do: None) -> dict[str, Any]:
    """Half a second by the demo model: the same tokens from the torch sampler and the one in use, and real sound.

    `problem(what, do)` is told what failed.
    """
    from .musicgen import MusicGen
    from .sampling.backends import VARIABLE

    start, device = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    out: dict[str, Any] = {"ok": False, "device": device}
    before = os.environ.get(VARIABLE)
    try:
        model = MusicGen.get_pretrained("demo", device=device)
        model.set_generation_params(duration=0.5)
        tokens = {}
        for name in dict.fromkeys(("torch", before or "auto")):
            os.environ[VARIABLE] = name
            wav, tokens[name] = model.generate(["a slow sad tune with bells"], return_tokens=True, seed=1)
        out["same_tokens"] = len({t.cpu().numpy().tobytes() for t in tokens.values()}) == 1
        out["finite"] = bool(torch.isfinite(wav).all())
        out["loud"] = bool(wav.abs().max() > 1e-3)
        out["ok"] = out["same_tokens"] and out["finite"] and out["loud"]
        if not out["ok"]:
            failed = [key for key in ("same_tokens", "finite", "loud") if not out[key]]
            problem(f"the self-test failed: {', '.join(failed)}", "reinstall musicgen-fast; if it stays, report it")
    except Exception as error:
        out["error"] = _short(error)
        problem(f"the self-test failed: {out['error']}", "reinstall musicgen-fast; if it stays, report it with --json")
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before
    out["seconds"] = round(time.perf_counter() - start, 2)
    return out


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
