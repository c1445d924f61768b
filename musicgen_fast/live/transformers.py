"""transformers' MusicGen and MusicGen Melody on our engine.

Stands in for one method, `_sample`: everything before it (configuration, text encoder, audio prompts, the delay mask)
and after it (back to frames, the codec) stays transformers' own, in whatever version is installed. `generate` is
wrapped only for what transformers gets wrong (streamers, several sequences) and for what it must not send our way.

Shapes: ids [B*K, columns], codebook minor; K codebooks, of a stereo model left and right in turn.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.transformers import model_config, names_in_file
from ..config import ModelConfig
from ..model import Transformer
from ..state import Branch, Conditions
from .handle import HANDLE, LiveModel, OnColumn, Unsupported, own_precision, warn_unsupported
from .law import Law, other_criteria, read_processors
from .requests import expanded, setting, unsupported_arguments
from .weights import Weights, convert

# What generate hands to _sample; anything else would change the result.
_KNOWN = {
    *("attention_mask", "use_cache", "guidance_scale", "encoder_outputs", "encoder_hidden_states", "past_key_values"),
    *("decoder_delay_pattern_mask", "input_values", "padding_mask", "audio_scales", "input_features"),
    *("prefill_outputs", "cache_position"),
}
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass
class _Call:
    """A running `generate` of ours: what `_sample` and `_prefill` cannot be told otherwise."""

    handle: LiveTransformers
    streamer: Any
    theirs: bool = False  # it fell back


_CALL: ContextVar[_Call | None] = ContextVar("musicgen_fast_call", default=None)


class _FloatLogits(Transformer):
    """transformers mixes the branches in float32, whatever the weights are."""

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x).float()


class LiveTransformers(LiveModel):
    """An accelerated `MusicgenForConditionalGeneration` or `MusicgenMelodyForConditionalGeneration`."""

    @property
    def config(self) -> ModelConfig:
        raw = self.target.config.to_dict()
        raw["text_encoder"] = {"d_model": raw["text_encoder"].get("d_model") or raw["text_encoder"].get("hidden_size")}
        config = model_config(raw, Path("model.config"))
        # texts and melodies arrive projected: the live object does that
        fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
        return ModelConfig(**{**fields, "text": None, "melody": None})

    def parameters(self) -> dict[str, Tensor]:
        return {f"decoder.{name}": p for name, p in self.target.decoder.named_parameters(remove_duplicate=False)}

    def convert(self) -> Weights:
        config = self.config
        return convert(config, names_in_file(config), self.parameters(), _FloatLogits)

    def install(self, model: Any) -> None:
        own: dict[str, Any] = {HANDLE: self, "generate": self.generate, "_sample": self._sample}
        if hasattr(type(model), "_prefill"):
            own["_prefill"] = self._prefill
        vars(model).update(own)  # not setattr: nothing of this is a parameter or a module

    def remove(self, model: Any) -> None:
        for name in (HANDLE, "generate", "_sample", "_prefill"):
            vars(model).pop(name, None)

    # -- in the place of the model's methods --------------------------------------------------------------------------

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        synced_gpus: bool | None = None,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own `generate`, its arguments and results, with our loop inside; see `accelerate`."""
        model = self.target
        theirs = type(model).generate
        rest = (generation_config, logits_processor, stopping_criteria, synced_gpus, streamer)
        names = unsupported_arguments(model, generation_config, logits_processor, stopping_criteria, kwargs)
        if names:
            warn_unsupported(names)
            return theirs(model, inputs, *rest, **kwargs)
        count = setting(model, generation_config, kwargs, "num_return_sequences") or 1
        if count > 1 and setting(model, generation_config, kwargs, "do_sample"):  # greedily: transformers refuses
            inputs, kwargs = expanded(inputs, kwargs, count, model.decoder.num_codebooks)
            kwargs["num_return_sequences"] = 1
        token = _CALL.set(_Call(self, streamer))
        try:
            return theirs(model, inputs, *rest, **kwargs)
        finally:
            _CALL.reset(token)

    def _prefill(self, *args: Any, **kwargs: Any) -> Any:
        """transformers 5 runs the prompt before `_sample`, which runs it again: not for ours."""
        call = _CALL.get()
        if call is not None and call.handle is self and not call.theirs:
            return None
        return type(self.target)._prefill(self.target, *args, **kwargs)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """ids [B*K, L] of the finished sequence, special tokens in the gaps of the pattern."""
        model, call = self.target, _CALL.get()
        lists = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
        lists |= {"generation_config": generation_config, "synced_gpus": synced_gpus}
        if call is None or call.handle is not self:  # not by way of our generate
            return type(model)._sample(model, input_ids, **lists, streamer=streamer, **model_kwargs)
        streamer = call.streamer if streamer is None else streamer
        try:
            ids = self._run(input_ids, lists, model_kwargs, streamer)
        except Unsupported as reason:
            warn_unsupported(reason.names)
            call.theirs = True
            return type(model)._sample(model, input_ids, **lists, streamer=streamer, **model_kwargs)
        if streamer is not None:
            streamer.end()
        if generation_config.return_dict_in_generate:
            from transformers.generation.utils import GenerateEncoderDecoderOutput

            return GenerateEncoderDecoderOutput(sequences=ids)  # type: ignore[arg-type]
        return ids

    # -- inside -------------------------------------------------------------------------------------------------------

    def _run(self, input_ids: Tensor, lists: dict[str, Any], kwargs: dict[str, Any], streamer: Any) -> Tensor:
        """The sequence, by our engine. Unsupported is raised before anything is drawn or streamed."""
        generation = lists["generation_config"]
        mask = kwargs["decoder_delay_pattern_mask"]
        names = [name for name, value in kwargs.items() if name not in _KNOWN and value is not None]
        if generation.return_dict_in_generate:
            names += [name for name in _OUTPUTS if getattr(generation, name, None)]
        names += other_criteria(lists["stopping_criteria"], mask.shape[1])
        if lists["synced_gpus"]:
            names.append("synced_gpus")
        law = read_processors(lists["logits_processor"], generation.do_sample)
        if names:
            raise Unsupported(*names)
        try:
            lm = self.current()
        except ValueError as error:
            raise Unsupported(f"this model any more ({error})") from error
        sheet = _Sheet.read(mask, input_ids, lm.config)
        conditions = self._conditions(kwargs, len(sheet.prompt), law)
        lm = lm.for_run(lambda batch: law.params(batch, lm.num_codebooks, lm.device), _putting(streamer))
        with own_precision(lm.device):
            prompt = sheet.prompt if sheet.prompt.shape[2] else None
            tokens = lm.generate(prompt, conditions, max_gen_len=sheet.frames)
        return sheet.write(tokens)

    def _conditions(self, kwargs: dict[str, Any], batch: int, law: Law) -> Conditions:
        count = 1 if law.guidance is None else 2
        if hasattr(self.target.config, "chroma_length"):
            if not _keeps_conditioning(self.target):
                raise Unsupported("melody models of this version of transformers, which forgets text and melody")
            if kwargs.get("attention_mask") is not None:
                raise Unsupported("attention_mask beside encoder_hidden_states")
            branches = _prefixes(kwargs.get("encoder_hidden_states"), count)
        else:
            branches = _crosses(self._projected(kwargs), kwargs.get("attention_mask"), count)
        if any(len(rows or ()) not in (0, batch) for b in branches for rows in (b.prefix, b.cross)):
            raise Unsupported("conditions of another batch size than the prompt's")
        return Conditions(batch, branches, count)

    def _projected(self, kwargs: dict[str, Any]) -> Tensor:
        """Text states [R, N, d], as the model's forward would hand them to its decoder; padding is zero."""
        model, mask = self.target, kwargs.get("attention_mask")
        states = kwargs["encoder_outputs"][0]
        if model.text_encoder.config.hidden_size != model.decoder.config.hidden_size:
            states = model.enc_to_dec_proj(states)
        return states if mask is None else states * mask[..., None]


@dataclass
class _Sheet:
    """The sequence as transformers writes it down: a delay mask [B, K, L], -1 in the cells that are to be generated."""

    mask: Tensor
    columns: Tensor  # int64 [B, K, F], where each frame stands
    prompt: Tensor  # [B, K, P]

    @property
    def frames(self) -> int:
        return self.columns.shape[2]

    @classmethod
    def read(cls, mask: Tensor, input_ids: Tensor, config: ModelConfig) -> _Sheet:
        if len(mask) != len(input_ids):
            raise Unsupported("num_return_sequences in this form")
        k = config.num_codebooks
        per_channel, length = k // config.audio_channels, mask.shape[1]
        if length < 2 * per_channel - 1:
            raise Unsupported()  # so short that transformers generates without delays: a handful of steps
        mask = mask.view(-1, k, length)
        frames, known = length - per_channel, input_ids.shape[1] - 1
        if not 0 <= known < frames:
            raise Unsupported("a prompt as long as max_length")
        delays = torch.tensor(config.pattern.delays, device=mask.device)
        columns = (1 + delays[:, None] + torch.arange(frames, device=mask.device)).expand(len(mask), -1, -1)
        codes = mask.gather(2, columns)
        prompt = codes[:, :, :known]
        if ((prompt < 0) | (prompt >= config.vocab_size)).any() or (codes[:, :, known:] != -1).any():
            raise Unsupported("decoder_input_ids with gaps or special tokens")
        return cls(mask, columns, prompt)

    def write(self, tokens: Tensor) -> Tensor:
        """tokens [B, K, F] -> ids [B*K, L]."""
        return self.mask.scatter(2, self.columns, tokens.to(self.mask.device)).flatten(0, 1)


def _putting(streamer: Any) -> OnColumn | None:
    """What gives columns [B, K] to a streamer, as transformers' loop does: [B*K] on the CPU."""
    if streamer is None:
        return None
    return lambda column: streamer.put(column.flatten().cpu())


def _prefixes(states: Tensor | None, count: int) -> list[Branch]:
    """Branches of a melody model: [R, P, d] goes before the sequence, padding included."""
    if states is None:
        return [Branch() for _ in range(count)]
    if len(states) % count:
        raise Unsupported("encoder_hidden_states without a second half for guidance")
    return [Branch(prefix=list(part)) for part in states.chunk(count)]


def _crosses(states: Tensor, mask: Tensor | None, count: int) -> list[Branch]:
    """Branches of a text model: [R, N, d] is attended where `mask` [R, N] is not 0; nothing of it is a row of zeros."""
    if len(states) % count:
        raise Unsupported("encoder_outputs without a second half for guidance")
    rows = list(states)
    if mask is not None:
        rows = [row[kept] for row, kept in zip(rows, mask.to(states.device) != 0, strict=True)]
    size = len(rows) // count
    parts = [rows[i * size : (i + 1) * size] for i in range(count)]
    heard = [any(len(row) for row in part) for part in parts]
    nothing = states.new_zeros(1, states.shape[2])
    branches = []
    for i, part in enumerate(parts):
        # a branch that attends to nothing costs nothing, if it is one of the last
        branches.append(Branch(cross=[row if len(row) else nothing for row in part]) if any(heard[i:]) else Branch())
    return branches


@torch.no_grad()
def _keeps_conditioning(model: Any) -> bool:
    """Whether the first step of the model's own generate would see its text and melody.

    4.57 and early versions 5 drop them where a cache was prepared before the first step.
    """
    from transformers import DynamicCache

    ids = torch.zeros(model.decoder.num_codebooks, 1, dtype=torch.int64)
    states = torch.zeros(1, 1, 1)
    try:
        prepared = model.prepare_inputs_for_generation(
            ids,
            encoder_hidden_states=states,
            past_key_values=DynamicCache(),
            use_cache=True,
            decoder_delay_pattern_mask=ids,
            is_first_iteration=True,
        )
    except Exception:  # another signature: nothing is known about it
        return False
    return prepared.get("encoder_hidden_states") is states
