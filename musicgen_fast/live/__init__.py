"""Other people's live models, with this project's generation inside: `accelerate(model)` and `unaccelerate(model)`.

Takes transformers' `MusicgenForConditionalGeneration` and `MusicgenMelodyForConditionalGeneration` and audiocraft's
`MusicGen` and `AudioGen` as they lie in memory. The object stays the same, and so do its calls, its text encoder, its
codec and its random numbers; only the loop over the tokens is ours. Imports neither library before it is given one.
(Not a module `accelerate`: it would take the place of the function of that name in the package.)
"""

from __future__ import annotations

from typing import Any, TypeVar

from .handle import HANDLE, LiveModel

__all__ = ["LiveModel", "accelerate", "unaccelerate"]

Model = TypeVar("Model")

_TRANSFORMERS = ("MusicgenForConditionalGeneration", "MusicgenMelodyForConditionalGeneration")
_AUDIOCRAFT = ("MusicGen", "AudioGen")


def accelerate(model: Model) -> Model:
    """Makes `model.generate` run on this project's engine: the same object, arguments and results.

    With float32 weights the tokens are those of the untouched object for the same torch seed. transformers:
    `streamer=` is given the prompt and then every column of tokens (transformers 5 itself forgets it), and
    `num_return_sequences` gives that many different sounds per input. audiocraft: everything that generates goes
    through `model.lm.generate`, which is what changes; windows, progress and parameters stay audiocraft's.
    The sound is made by the model's own codec, so that it is the same to the last bit.

    `model.musicgen_fast` says what was done: `shared_bytes` of weights are used where they lie, `extra_bytes` are
    copies: ours keeps q, k, v, the embeddings and the heads stacked (small in float32: 0.57 GB of 1.68 GB for
    transformers, 0.07 GB for audiocraft, where q, k, v are stacked already). Weights that change afterwards
    (`load_state_dict`, an optimizer, `.to()`, `.half()`) are noticed at the next call and read again.
    Writing through `.data` goes unnoticed: call `accelerate` again, which reads all weights anew.

    What is not computed here (beams, one's own logits processors or stopping criteria, `output_scores`, training mode,
    melody models of a transformers that forgets the melody, ...) runs in the model's own code, with one warning that
    names it. Not so `return_dict_in_generate` alone: its dictionary then holds `sequences` and no cache.

    Returns:
        `model` itself.

    Raises:
        TypeError: another kind of object.
        ValueError: a model with parts that this project does not compute (quantized, offloaded, adapters, ...).
    """
    handle = vars(model).get(HANDLE) if hasattr(model, "__dict__") else None
    if not isinstance(handle, LiveModel) or not handle.belongs_to(model):
        handle = _handle_class(model)(model)
    handle.refresh()
    handle.install(model)
    return model


def unaccelerate(model: Model) -> Model:
    """Gives an accelerated model its own `generate` back and drops our copies of weights; others are left alone.

    Returns:
        `model` itself.
    """
    handle = vars(model).get(HANDLE) if hasattr(model, "__dict__") else None
    if isinstance(handle, LiveModel):
        handle.remove(model)
    return model


def _handle_class(model: Any) -> type[LiveModel]:
    classes = [(c.__module__.partition(".")[0], c.__name__) for c in type(model).__mro__]
    if any(("transformers", name) in classes for name in _TRANSFORMERS):
        from .transformers import LiveTransformers

        return LiveTransformers
    if any(("audiocraft", name) in classes for name in _AUDIOCRAFT):
        from .audiocraft import LiveAudiocraft

        return LiveAudiocraft
    raise TypeError(
        f"cannot accelerate a {type(model).__module__}.{type(model).__qualname__}: supported are transformers' "
        f"{' and '.join(_TRANSFORMERS)}, and audiocraft's {' and '.join(_AUDIOCRAFT)}"
    )
