"""Weights as the CPU decoder reads them: matrices packed in a format of `csrc/cpu/linear.h`, in the order of a step.

    float32 | bfloat16 | int8 (groups of 128 inputs with a scale) | int4 (the same; its logits stay int8)

Packed tensors are bytes: the same on every machine, so they can be written to a file and mapped. Knows nothing of files
and of decoding. What a step reads lies together, one layer after the other; embeddings, of which it reads a row each,
and what is needed once a request come last.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from . import native
from .arena import aligned, allocate
from .config import ModelConfig

PACKED_PRECISIONS = ("float32", "bfloat16", "int8", "int4")
_MATRICES = ("qkv", "attn_out", "cross_q", "cross_out", "ffn_in", "ffn_out")
_NORMS = ("norm1", "norm_cross", "norm2")
_BY_HEADS = {"qkv": 3, "cross_kv": 2}  # matrices whose outputs are ordered head by head, and parts of each head


@dataclass
class PackedWeights:
    """The language model of `config`, packed.

    Attributes:
        precision: one of `PACKED_PRECISIONS`.
        tensors: uint8 [bytes] by canonical name (`layers.0.qkv.weight`), each on a 64-byte boundary.
        formats: the format of every matrix.
        projections: `text_proj.*` and `melody_proj.*`, float32: the conditioners apply them.
    """

    config: ModelConfig
    precision: str
    tensors: dict[str, Tensor]
    formats: dict[str, str]
    projections: dict[str, Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(len(t) for t in self.tensors.values())


def packed_layout(config: ModelConfig, precision: str) -> list[tuple[str, str | None, int]]:
    """(name, format or None for what is no matrix, bytes) of all tensors in the order of their memory.

    Raises ValueError for an unknown precision.
    """
    if precision not in PACKED_PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: expected one of {', '.join(PACKED_PRECISIONS)}")
    shapes = dict(_matrix_shapes(config))
    heads = "int8" if precision == "int4" else precision  # 2 % of a step's bytes, and the logits hang on them
    formats = dict.fromkeys(shapes, precision) | {"heads.weight": heads}
    size_of = native.extension().linear_packed_bytes
    layout: list[tuple[str, str | None, int]] = [(n, formats[n], size_of(formats[n], *shapes[n])) for n in shapes]
    norms = [f"layers.{i}.{name}" for i in range(config.num_layers) for name in _NORMS]
    norms = [n for n in norms if config.conditioning == "cross" or not n.endswith("norm_cross")] + ["norm"]
    layout += [(f"{n}.{part}", None, 4 * config.dim) for n in norms for part in ("weight", "bias")]
    item = 4 if precision == "float32" else 2
    layout.append(("emb.weight", None, item * config.num_codebooks * (config.vocab_size + 1) * config.dim))
    return layout


def _matrix_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """Matrices in the order in which a step reads them; then those of a request's texts."""
    d, cross = config.dim, config.conditioning == "cross"
    sizes = {"qkv": (3 * d, d), "ffn_in": (config.ffn_dim, d), "ffn_out": (d, config.ffn_dim)}
    for i in range(config.num_layers):
        for name in _MATRICES:
            if cross or not name.startswith("cross"):
                yield f"layers.{i}.{name}.weight", sizes.get(name, (d, d))
    yield "heads.weight", (config.num_codebooks * config.vocab_size, d)
    for i in range(config.num_layers if cross else 0):
        yield f"layers.{i}.cross_kv.weight", (2 * d, d)


def pack_weights(config: ModelConfig, weights: dict[str, Tensor], precision: str) -> PackedWeights:
    """Pack weights (canonical names), taking them out of the dict one by one: they exist once, and packed.

    Raises:
        ValueError: an unknown precision, or weights that are NaN or infinite.
        MemoryError: no room.
    """
    layout = packed_layout(config, precision)
    tensors: dict[str, Tensor] = {}
    projections = {n: weights.pop(n).float() for n in list(weights) if n.startswith(("text_proj.", "melody_proj."))}

    def fill(name: str, form: str | None) -> None:
        source = _ordered(config, name, weights.pop(name))
        if form is None:
            dtype = torch.bfloat16 if len(tensors[name]) == 2 * source.numel() else torch.float32
            tensors[name].view(dtype).copy_(source.reshape(-1))
        elif not native.extension().linear_pack(form, source.float().contiguous().numpy(), tensors[name].numpy()):
            raise ValueError(f"{name} holds NaN or infinite values: the checkpoint is broken, or too large for {form}")

    try:
        _on_all_threads(lambda: tensors.update(place(layout)), [(fill, name, form) for name, form, _ in layout])
    except RuntimeError as error:  # torch has no MemoryError of its own, and Python none for threads
        if "memory" not in str(error) and "new thread" not in str(error):
            raise
        raise MemoryError(f"no room to pack the weights as {precision}: {str(error).splitlines()[0]}") from None
    return PackedWeights(config, precision, tensors, {n: f for n, f, _ in layout if f is not None}, projections)


def _on_all_threads(begin: Callable[[], None], calls: list[tuple]) -> None:
    """`begin`, then the calls on as many threads as torch uses, this one among them.

    The threads, and those of torch behind each, start before `begin` takes the memory: where they find no room for a
    stack or for thread-local data, the C library and libgomp end the process.
    """
    others = torch.get_num_threads() - 1
    todo: queue.SimpleQueue[tuple] = queue.SimpleQueue()
    ready, go = threading.Semaphore(0), threading.Event()

    def work() -> None:
        while not todo.empty():
            try:
                function, *arguments = todo.get_nowait()
            except queue.Empty:  # another thread was faster
                return
            function(*arguments)

    def wait_and_work() -> None:
        torch.zeros(1 << 16).add_(1)
        ready.release()
        go.wait()
        work()

    torch.zeros(1 << 16).add_(1)  # large enough to be shared among torch's threads
    with ThreadPoolExecutor(max(1, others)) as pool:
        try:
            started = [pool.submit(wait_and_work) for _ in range(others)]
            for _ in started:
                ready.acquire()
            begin()
            for call in calls:
                todo.put(call)
        finally:
            go.set()
        work()
        for done in started:
            done.result()


def place(layout: list[tuple[str, str | None, int]]) -> dict[str, Tensor]:
    """Memory for a layout: one mapping, in its order."""
    memory = allocate(sum(aligned(size) for _, _, size in layout))
    tensors, offset = {}, 0
    for name, _, size in layout:
        tensors[name] = memory[offset : offset + size]
        offset += aligned(size)
    return tensors


def unpack_weights(packed: PackedWeights) -> dict[str, Tensor]:
    """The weights that the kernels compute with: float32, canonical names and order."""
    config, shapes, weights = packed.config, dict(_matrix_shapes(packed.config)), dict(packed.projections)
    for name, tensor in packed.tensors.items():
        if name in shapes:
            out = torch.empty(shapes[name])
            native.extension().linear_unpack(packed.formats[name], tensor.numpy(), out.numpy())
            weights[name] = _ordered(config, name, out, back=True)
        elif name == "emb.weight":
            wide = len(tensor) == 4 * config.num_codebooks * (config.vocab_size + 1) * config.dim
            weights[name] = tensor.view(torch.float32 if wide else torch.bfloat16).float().view(-1, config.dim)
        else:
            weights[name] = tensor.view(torch.float32).clone()
    return weights


def _ordered(config: ModelConfig, name: str, weight: Tensor, back: bool = False) -> Tensor:
    """Rows [part, head, d/H] -> [head, part, d/H] of the matrices that are ordered by heads; others as they are."""
    kind = name.split(".")[-2]
    if kind not in _BY_HEADS:
        return weight
    sizes = {"p": _BY_HEADS[kind], "h": config.num_heads}
    pattern = "(h p e) d -> (p h e) d" if back else "(p h e) d -> (h p e) d"
    return rearrange(weight, pattern, **sizes).contiguous()
