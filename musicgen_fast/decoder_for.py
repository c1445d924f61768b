"""Which decoder serves a model: the packed one's own, on a GPU the CUDA decoder, otherwise torch.

MUSICGEN_FAST_CUDA picks on a GPU: v3 (Triton kernels; the default in half precision and int8), v1 (torch's products;
the default in float32), torch (no graph at all). What was not picked by name is tried first: a few columns must give
the logits of the reference, or the next one serves and a warning says why. MUSICGEN_FAST_KV=int8 halves the memory of
keys and values; MUSICGEN_FAST_FOLD=1 folds short texts while few run; MUSICGEN_FAST_PDL=0 has no kernel overlap the
one before.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .decoders.cpu_model import PackedTransformer
from .decoders.torch import TorchDecoder
from .lanes import Decoder
from .model import Transformer
from .pattern import build_pattern
from .quantised import QuantisedLinear
from .sampling import SamplingParams
from .state import Branch, Conditions, Place, Sampler, State

if TYPE_CHECKING:
    from .decoders.cuda import CudaDecoder

log = logging.getLogger(__name__)

CHOICES = ("v3", "v1", "torch")
_LIMIT = {torch.float16: 0.01, torch.bfloat16: 0.06, torch.float32: 1e-3}  # relative error of logits that is no fault


def decoder_for(transformer: Transformer | PackedTransformer) -> Decoder:
    """ValueError for an unknown choice, RuntimeError where the one asked for cannot serve, with the reason."""
    if isinstance(transformer, PackedTransformer):
        return transformer.decoder
    if transformer.device.type != "cuda":
        return TorchDecoder(transformer)
    asked = os.environ.get("MUSICGEN_FAST_CUDA", "auto") or "auto"
    if asked not in ("auto", *CHOICES):
        raise ValueError(f"MUSICGEN_FAST_CUDA must be auto, {', '.join(CHOICES)}; got {asked!r}")
    kv = os.environ.get("MUSICGEN_FAST_KV") or None
    quantised = isinstance(transformer.heads, QuantisedLinear)
    builders: dict[str, Callable[[], Decoder]] = {
        "v3": lambda: cuda_decoder(transformer, "v3", kv),
        "v1": lambda: cuda_decoder(transformer, "v1", kv),
        "torch": lambda: TorchDecoder(transformer),
    }
    if asked != "auto":
        if asked == "torch" and quantised:
            raise RuntimeError("the torch decoder (MUSICGEN_FAST_CUDA=torch) does not run int8 weights: take v3 or v1")
        return builders[asked]()
    order = ["v1", "torch"] if transformer.dtype == torch.float32 else ["v3", "v1", "torch"]
    return first_sound(transformer, {name: builders[name] for name in order if not (name == "torch" and quantised)})


def cuda_decoder(transformer: Transformer, version: str, kv: str | None = None) -> CudaDecoder:
    """v3 or v1, with graphs. RuntimeError without Triton, which draws in both."""
    # Here, because a source tree that is not installed has no musicgen_fast.kernels, and needs none on a CPU.
    from .decoders.cuda import CudaDecoder
    from .decoders.cuda_graphs import CudaGraphs
    from .decoders.cuda_ops import torch_ops, triton_ops

    device = transformer.device
    try:
        ops = triton_ops() if version == "v3" else torch_ops(device)
    except ImportError as error:
        raise RuntimeError(f"the CUDA decoder needs Triton, which cannot be imported ({error})") from error
    # Programmatic dependent launch came with Hopper.
    pdl = torch.cuda.get_device_capability(device)[0] >= 9 and os.environ.get("MUSICGEN_FAST_PDL") != "0"
    fold = os.environ.get("MUSICGEN_FAST_FOLD") == "1" and not isinstance(transformer.heads, QuantisedLinear)
    return CudaDecoder(transformer, ops, capture=CudaGraphs(device), kv=kv, pdl=pdl and version == "v3", fold=fold)


def first_sound(transformer: Transformer, builders: dict[str, Callable[[], Decoder]]) -> Decoder:
    """The first decoder that gives the reference's logits; the last one is taken as it is.

    Kernels meet processors and compilers here that nobody has tried: a wrong number would only be heard.
    """
    *tried, last = builders
    for name in tried:
        try:
            decoder = builders[name]()
            error = logits_error(decoder, transformer)
        except Exception as problem:  # whatever a compiler or a driver may raise
            log.warning("decoder %s does not run here, and the next one serves; please report it: %s", name, problem)
            continue
        if error <= _LIMIT[transformer.dtype]:
            return decoder
        log.warning("decoder %s is %.2g off the reference here, and the next one serves; please report it", name, error)
    return builders[last]()


class _Kept(Sampler):
    """Keeps the logits and draws nothing: all tokens are known."""

    def __init__(self, num_codebooks: int, device: torch.device):
        super().__init__(SamplingParams.build(1, num_codebooks, device))
        self.logits: list[Tensor] = []

    def __call__(self, logits: Tensor, place: Place) -> None:
        self.logits.append(logits[:, 0].float().clone())


@torch.no_grad()
def logits_error(decoder: Decoder, transformer: Transformer, frames: int = 8) -> float:
    """Relative error of a decoder's logits against `transformer.forward`, over the columns of one request with CFG.

    `frames` random ones, the same every time; the norm of the difference over that of the reference.
    """
    config, device = decoder.config, transformer.device
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, config.vocab_size, (1, config.num_codebooks, frames), generator=generator).to(device)
    states = torch.randn(6, config.dim, generator=generator).to(device)
    cross = config.conditioning == "cross"
    asked = Branch(cross=[states]) if cross else Branch(prefix=[states])
    conditions = Conditions(1, [asked, Branch() if cross else asked], 2)
    kept, pattern = _Kept(config.num_codebooks, device), build_pattern(config.pattern, config.num_codebooks, frames)
    kv = decoder.allocate(2, max(conditions.prefix_lengths()) + pattern.num_steps)
    state = State(config, kv, [0, 0], conditions, kept)
    decoder.condition(state)
    state.start_window(pattern, codes, 0, 0)
    decoder.prefill(state)
    while not state.done:
        decoder.step(state)
    tokens = pattern.build(codes, config.special_token)[:, :, :-1]
    first = pattern.first_step(0) - 1
    expected = []
    for branch in conditions.branches:
        prefix = states[None] if branch.prefix else None
        text = states[None] if branch.cross else None
        expected.append(transformer(tokens, prefix, text)[0, first:].float())
    found, wanted = torch.stack(kept.logits, dim=1), torch.stack(expected)
    return ((found - wanted).norm() / wanted.norm()).item()
