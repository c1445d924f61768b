"""The strongest peer on a CPU: the same decoder in OpenVINO, its weights compressed by NNCF, its KV cache stateful.

The graph holds the model's own weights. Its attention becomes the plugin's kernel that keeps keys and values in place
(8-bit beside compressed weights); that needs `beam`, the rows to go on from. The text's keys and values are computed
once. One request with guidance; logits are drawn by this project's sampler.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints import load_checkpoint
from ..config import ModelConfig
from ..model import Layer, Transformer, embed_tokens, position_table
from ..sampling import sample
from .job import AbsentError, Job, Run, Step

__all__ = ["PRECISIONS", "OpenVinoDecoder", "StepModule", "build", "text_states"]

PRECISIONS = ("float32", "int8", "int4")
POSITIONS = 2048


class StepModule(nn.Module):
    """One step as a graph: tokens [2, K, 1], position [1], beam [2], then keys and values [2, H, T, d/H] of each layer
    -> logits [2, K, V] and the keys and values with one position more. `texts` [N, d]: the states of the first row."""

    def __init__(self, model: Transformer, texts: Tensor):
        super().__init__()
        self.model, self.heads = model, model.config.num_heads
        self.register_buffer("positions", position_table(POSITIONS, model.config.dim))
        both = torch.stack([texts.float(), torch.zeros_like(texts, dtype=torch.float32)])  # a null row adds nothing
        for index, layer in enumerate(self.layers):
            for name, part in zip("kv", layer.cross_kv(both).chunk(2, dim=-1), strict=True):
                self.register_buffer(f"text_{name}{index}", layer.heads(part).contiguous())

    @property
    def layers(self) -> list[Layer]:
        return list(self.model.layers)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor, position: Tensor, beam: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        x = embed_tokens(self.model.emb.weight, tokens) + F.embedding(position, self.positions)  # type: ignore[arg-type]
        present: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            q, k, v = (self._heads(part) for part in layer.qkv(layer.norm1(x)).chunk(3, dim=-1))
            keys = torch.cat([torch.index_select(past[2 * index], 0, beam), k], dim=2)
            values = torch.cat([torch.index_select(past[2 * index + 1], 0, beam), v], dim=2)
            present += [keys, values]
            x = x + layer.attn_out(self._joined(F.scaled_dot_product_attention(q, keys, values)))
            q = self._heads(layer.cross_q(layer.norm_cross(x)))
            texts = (getattr(self, f"text_{name}{index}") for name in "kv")
            x = x + layer.cross_out(self._joined(F.scaled_dot_product_attention(q, *texts)))
            x = x + layer.ffn_out(F.gelu(layer.ffn_in(layer.norm2(x))))
        return (self.model.logits(x)[:, 0], *present)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(2, 1, self.heads, -1).transpose(1, 2)

    @staticmethod
    def _joined(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(2, 1, -1)


class OpenVinoDecoder:
    """A compiled graph and its state. `kernels` counts the layers that became the plugin's stateful attention."""

    def __init__(self, model: Transformer, texts: Tensor, precision: str, threads: int):
        import openvino as ov

        self.config = model.config
        graph = stateful_graph(StepModule(model, texts).eval(), model.config)
        if precision != "float32":
            graph = _compressed(graph, precision)
        # float32 between 8-bit weights and keys: on an AVX-512 machine with bfloat16 the default, bfloat16, takes 34 to
        # 38 ms at 16 positions where this takes 20 to 22, and 16-bit keys are slower than 8-bit ones at 1,440.
        options: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": "NO",
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32" if precision == "float32" else "u8",
        }
        compiled = ov.Core().compile_model(graph, "CPU", options)
        kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
        self.kernels = sum("ScaledDotProductAttention" in kind for kind in kinds)
        self._request = compiled.create_infer_request()
        self._beam = np.arange(2, dtype=np.int32)
        self.position = 0

    def start(self, position: int) -> None:
        """Begin with `position` keys and values of zeros: the time of a step does not depend on them."""
        import openvino as ov

        self._request.reset_state()
        self.position = position
        if position:
            zeros = np.zeros((2, self.config.num_heads, position, self.config.head_dim), np.float32)
            for variable in self._request.query_state():
                variable.state = ov.Tensor(zeros)

    def step(self, tokens: Tensor) -> Tensor:
        """int64 tokens [K] of a column -> logits [2, K, V]."""
        inputs = {
            "tokens": tokens.expand(2, -1)[:, :, None].numpy(),
            "position": np.array([self.position], np.int64),
            "beam": self._beam,
        }
        self.position += 1
        return torch.from_numpy(next(iter(self._request.infer(inputs).values())))


def stateful_graph(module: StepModule, config: ModelConfig) -> Any:
    """The traced graph with its keys and values turned from inputs and outputs into variables that start empty."""
    import openvino as ov
    from openvino import opset13 as op
    from openvino._offline_transformations import apply_make_stateful_transformation

    heads, head_dim = config.num_heads, config.head_dim
    past = [torch.zeros(2, heads, 3, head_dim) for _ in range(2 * config.num_layers)]
    tokens = torch.zeros(2, config.num_codebooks, 1, dtype=torch.int64)
    example = (tokens, torch.tensor([3]), torch.arange(2, dtype=torch.int32), *past)
    with torch.no_grad():
        graph = ov.convert_model(module, example_input=example)
    names = ["tokens", "position", "beam", *(f"past{i}" for i in range(len(past)))]
    shapes = [[2, config.num_codebooks, 1], [1], [2], *([2, heads, -1, head_dim] for _ in past)]
    for entry, name, shape in zip(graph.inputs, names, shapes, strict=True):
        entry.get_node().set_partial_shape(ov.PartialShape(shape))
        entry.get_tensor().set_names({name})
    for i, entry in enumerate(graph.outputs[1:]):
        entry.get_tensor().set_names({f"present{i}"})
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, {f"past{i}": f"present{i}" for i in range(len(past))})
    for node in graph.get_ops():  # without a first value the fused attention does not compile
        if node.get_type_name() == "ReadValue":
            empty = op.constant([2, heads, 0, head_dim], dtype="int64")
            node.set_arguments([op.broadcast(op.constant(0.0, dtype=node.get_output_element_type(0)), empty)])
    graph.validate_nodes_and_infer_types()
    return graph


def _compressed(graph: Any, precision: str) -> Any:
    import logging

    import nncf

    nncf.set_log_level(logging.ERROR)
    if precision == "int8":
        return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM)
    return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=128, ratio=1.0)


def text_states(config: ModelConfig, count: int) -> Tensor:
    """Random states [N, d] of a text."""
    return torch.randn(count, config.dim, generator=torch.Generator().manual_seed(1))


def build(job: Job) -> Run:
    """A provider, see `providers.py`."""
    try:
        import nncf  # noqa: F401
        import openvino  # noqa: F401
    except ImportError as error:
        raise AbsentError(f"openvino and nncf are not installed ({error}; pip install openvino nncf)") from error
    if torch.device(job.device).type != "cpu":
        raise AbsentError("OpenVINO is timed on CPUs only")
    if job.precision not in PRECISIONS:
        raise AbsentError(f"OpenVINO is timed in {', '.join(PRECISIONS)}, not in {job.precision}")
    checkpoint = load_checkpoint(job.model)
    config = checkpoint.config
    if config.conditioning != "cross" or job.requests != 1:
        raise AbsentError("OpenVINO is timed on text models with one request only")
    model = Transformer.from_weights(config, checkpoint.lm)
    decoder = OpenVinoDecoder(model, text_states(config, job.text_tokens), job.precision, job.threads)
    del model, checkpoint

    def run(step: Step, start: int) -> None:
        decoder.start(start)
        tokens = torch.full((config.num_codebooks,), config.special_token)
        for number in range(job.steps):
            logits = decoder.step(tokens)
            tokens = sample(logits[:, None], cfg_coef=3.0, top_k=250, seed=0, step=number)[0]
            step()

    return run
