"""What the sections on the CUDA decoder share: models with random weights, decoders, requests at a position, times.

With `Bench("cpu", tiny=True)` all of it runs anywhere: a model of two layers, the reference kernels where Triton's
cannot run, launches in the place of graphs. Knows nothing of the report.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from types import ModuleType
from typing import Any

import torch
from gpu_lines import Bench
from torch import Tensor

try:
    import einops  # noqa: F401
except ImportError:  # of a machine where nothing can be installed; two patterns of it are used

    def _rearrange(x: Tensor, pattern: str, h: int = 1) -> Tensor:
        split = x.unflatten(-1, (h, -1)).transpose(1, 2) if pattern == "r s (h e) -> r h s e" else None
        assert split is not None or pattern == "r h s e -> r s (h e)", pattern
        return x.transpose(1, 2).flatten(2) if split is None else split

    sys.modules["einops"] = ModuleType("einops")
    sys.modules["einops"].rearrange = _rearrange  # type: ignore[attr-defined]

from musicgen_fast.config import ModelConfig, TextConfig, named_config
from musicgen_fast.decoders.cuda import CudaDecoder
from musicgen_fast.decoders.cuda_graphs import CudaGraphs, Launch, launch_at_once
from musicgen_fast.decoders.cuda_ops import torch_ops, triton_ops
from musicgen_fast.lanes import Lane, open_lane
from musicgen_fast.machine import synchronize
from musicgen_fast.model import Transformer
from musicgen_fast.pattern import UNKNOWN, build_pattern
from musicgen_fast.quantised import quantise
from musicgen_fast.roofline import step_bytes
from musicgen_fast.sampling import SamplingParams
from musicgen_fast.slots import Slots
from musicgen_fast.state import Branch, Conditions, Sampler, State
from musicgen_fast.windows import Window

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.float16}
TINY = ModelConfig(dim=128, num_layers=2, num_heads=2, ffn_dim=512, vocab_size=200, text=TextConfig(dim=12))
TEXT_TOKENS = 16


def sized(bench: Bench, size: str = "small") -> ModelConfig:
    """The shapes of a released size, or of the tiny model."""
    return TINY if bench.tiny else named_config(size)


@torch.no_grad()
def build_model(bench: Bench, size: str = "small", precision: str = "float16", config: Any = None) -> Transformer:
    """Random weights of order-one activations, drawn on the device in float32: the same ones in every precision."""
    config = config or sized(bench, size)
    with torch.device("meta"):
        model = Transformer(config)
    model.text_proj = model.melody_proj = None  # of the conditioners, which a step does not see
    generator = torch.Generator(bench.device).manual_seed(0)
    weights = {}
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, device=bench.device)
        if parameter.dim() == 2:
            values *= 0.5 if name == "emb.weight" else 1 / math.sqrt(parameter.shape[1])
            weights[name] = values.to(DTYPES[precision])
        else:
            weights[name] = 0.05 * values + (1.0 if name.endswith(".weight") else 0.0)
    model.load_state_dict(weights, strict=True, assign=True)
    model.eval().requires_grad_(False)
    if precision == "int8":
        quantise(model)
    return model


def build_ops(bench: Bench, version: str) -> Any:
    """The kernels of a version: v3 Triton's (on a CPU its interpreter's, if chosen, else the reference's in their
    place), v1 torch's own products."""
    runs_triton = bench.cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return triton_ops() if version == "v3" and runs_triton else torch_ops(torch.device(bench.device))


def build_decoder(
    bench: Bench, model: Transformer, version: str = "v3", kv: str | None = None, *, graphs: bool = True,
    pdl: bool | None = None, ops: Any = None,
) -> CudaDecoder:  # fmt: skip
    """`version`: v3, v1, or 'v3 folded', with the text folded into the projections around it."""
    capture = CudaGraphs(model.device) if graphs and bench.cuda else launch_at_once
    version, *folded = version.split()
    options: dict[str, Any] = {"fold": True} if folded else {}
    pdl = (bench.pdl if pdl is None else pdl) and version == "v3"
    return CudaDecoder(model, ops or build_ops(bench, version), capture=capture, kv=kv, pdl=pdl, **options)


# -- requests ---------------------------------------------------------------------------------------------------------


def conditions(config: ModelConfig, device: str, lengths: list[int], seed: int = 0, null: bool = True) -> Conditions:
    """A text of so many random states for each request, and the null branch of guidance."""
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(n, config.dim, generator=generator).to(device) for n in lengths]
    if config.conditioning == "cross":
        return Conditions(len(lengths), [Branch(cross=states)] + [Branch()] * null, 1 + null)
    return Conditions(
        len(lengths), [Branch(prefix=states), Branch(prefix=[s[:1] for s in states])][: 1 + null], 1 + null
    )


def sampler(config: ModelConfig, device: str, seeds: list[int] | None, batch: int = 1, **options: Any) -> Sampler:
    """Top-k 250 with guidance 3, unless the options say something else."""
    given = {"cfg_coef": 3.0, "top_k": 250, **options}
    params = SamplingParams.build(batch, config.num_codebooks, device, **given)
    counted = None if seeds is None else torch.tensor(seeds, dtype=torch.int64, device=device)
    return Sampler(params, counted)


@dataclass
class Opened:
    """Requests in lockstep at a position; `slots` are only held."""

    slots: Slots
    lane: Lane

    @property
    def state(self) -> State:
        return self.lane.state


@torch.no_grad()
def opened_at(bench: Bench, decoder: CudaDecoder, requests: int, position: int) -> Opened:
    """Requests that stand at a position of a whole window, as if they had come there: random numbers in the cache.

    Nothing is prefilled: that would take as long as 100 steps, and the time of a step does not depend on the values.
    """
    config, frames = decoder.config, bench.frames
    slots = Slots.on(decoder, requests, frames, bench.device)
    where = slots.take(requests)
    assert where is not None
    asked = conditions(config, bench.device, [bench.pick(TEXT_TOKENS, 4)] * requests)
    drawn = sampler(config, bench.device, list(range(requests)), requests)
    lane = open_lane(decoder, slots, slots.rows(where, 0), 0, asked, drawn)
    codes = torch.full((requests, config.num_codebooks, frames), UNKNOWN, dtype=torch.int64, device=bench.device)
    codes[:, :, :position] = torch.randint(0, config.vocab_size, (1, 1, position), device=bench.device)
    lane.state.start_window(build_pattern(config.pattern, config.num_codebooks, frames), codes, position, 0)
    lane.state.lengths = [lane.state.column - 1] * (2 * requests)
    fill_cache(decoder)
    return Opened(slots, lane)


def fill_cache(decoder: CudaDecoder) -> None:
    """Random keys and values: zeros draw less power, so a GPU would clock higher than with music."""
    pool = decoder._cache
    for layer in pool.tensor:  # one by one: the draw of int8 needs memory of its own
        layer.random_(-127, 128) if pool.scales is not None else layer.normal_()
    if pool.scales is not None:
        pool.scales.fill_(0.01)


def whole_window(frames: int) -> list[Window]:
    return [Window(0, 0, frames)]


def no_prompt(config: ModelConfig, device: str, batch: int = 1) -> Tensor:
    return torch.zeros(batch, config.num_codebooks, 0, dtype=torch.int64, device=device)


# -- times ------------------------------------------------------------------------------------------------------------


def elapsed_ms(bench: Bench, launch: Callable[[], object]) -> float:
    """Of one call, the device's work included."""
    if not bench.cuda:
        start = perf_counter()
        launch()
        return 1000 * (perf_counter() - start)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    launch()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after)


def median_ms(bench: Bench, launch: Callable[[], object], passes: int = 15, warm: int = 3) -> float:
    times = [elapsed_ms(bench, launch) for _ in range(bench.pick(passes + warm, 3))]
    return statistics.median(times[bench.pick(warm, 1) :])


@torch.no_grad()
def graph_of(bench: Bench, body: Launch) -> Launch:
    """`body` run once, then captured where there is a GPU."""
    body()
    synchronize(bench.device)
    return CudaGraphs(torch.device(bench.device))(body) if bench.cuda else body


@torch.no_grad()
def read_gb_s(bench: Bench) -> float:
    """The best speed of reading 1.5 GB, by anything at hand, of 15 passes each: what floors are computed from."""
    count = bench.pick(11_444 * 32_768, 1 << 16)
    buffer = torch.randn(count, device=bench.device)
    other = torch.empty_like(buffer)
    best = 0.0
    ways: list[tuple[Callable[[], object], int]] = [(buffer.sum, 1), (buffer.max, 1), (lambda: other.copy_(buffer), 2)]
    if bench.cuda:
        try:
            from gpu_kernels import read

            ways.append((lambda: read(buffer, other), 1))
            read(buffer, other)
        except Exception as problem:  # no Triton, or one that fails: torch's own remain
            print(f"the read kernel does not run here: {problem}", file=sys.stderr)
            ways = ways[:3]
    for way, passes in ways:
        times = [elapsed_ms(bench, way) for _ in range(bench.pick(18, 3))]
        best = max(best, passes * buffer.nbytes / min(times[2:]) / 1e6)
    return best


def floor_ms(config: ModelConfig, precision: str, kv: str | None, requests: int, position: float, gb_s: float) -> float:
    """The time of reading what a step at `position` must read; on a GPU kv None is the format of the activations."""
    kv = kv or ("float16" if precision == "int8" else precision)
    size = step_bytes(config, precision, position, kv=kv, requests=requests, text_tokens=TEXT_TOKENS)
    return size / gb_s / 1e6


def average_floor_ms(
    config: ModelConfig, precision: str, kv: str | None, requests: int, frames: int, gb_s: float
) -> float:
    """Over a window: bytes grow by a straight line, so it is the floor in the middle."""
    return floor_ms(config, precision, kv, requests, (frames + 3) / 2, gb_s)
