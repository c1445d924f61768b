"""Texts to T5 states: subword ids and the last hidden state of the encoder, one text at a time.

`TextTokenizer` knows T5's vocabulary files, `TextEncoder` the network (transformers' `T5EncoderModel`, always float32).
Neither knows the width of the music model, CFG or padding: the caller projects the states and pads or masks them.
Every text runs through the network alone. In a padded batch the same text would come out a rounding error apart,
depending on its neighbours, and a request would no longer be a function of its own inputs.
Shapes: n ids of a text, the closing </s> included; D the width of the T5 (768 for t5-base).
"""

from __future__ import annotations

import json
import struct
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError

__all__ = ["TextEncoder", "TextTokenizer"]

TOKENIZER_FILES = ("spiece.model", "tokenizer.json")
_SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2 of every T5
_EOS, _UNK = 1, 2
_EXTRA_IDS = 100  # sentinels that spiece.model lacks: <extra_id_99> .. <extra_id_0> follow its 32000 pieces
_CACHED_TEXTS = 256
_CACHED_ROWS = 65536  # 201 MB of states at D = 768: bounds the cache where texts are pages long
_HINT = "give text_encoder= the folder of a T5 (config.json, its weights, spiece.model or tokenizer.json)"


class SupportsIds(Protocol):
    """Any tokenizer: a text to T5 ids, the end token included."""

    def ids(self, text: str) -> list[int]: ...


class TextTokenizer:
    """T5's ids, equal to those of transformers 5's `T5Tokenizer` for every string.

    Runs on `tokenizers`, not on `sentencepiece`, although T5's vocabulary is a SentencePiece file. The two disagree
    where segmentations tie ("???????????": 1.8 % of repeated strings), on combining marks and around U+0085 and
    U+2581. Scores go in through the constructor: a tokenizer.json that is loaded by `Tokenizer.from_file` has scores
    off by one unit in the last place, which breaks ties the other way.
    """

    def __init__(self, pieces: Sequence[tuple[str, float]], charsmap: bytes | None):
        """`pieces`: (piece, log probability) by id, sentinels included; `charsmap`: SentencePiece's normalizer.

        CheckpointError for pieces that do not begin like T5's.
        """
        from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
        from tokenizers.models import Unigram

        if tuple(piece for piece, _ in pieces[:3]) != _SPECIAL:
            raise CheckpointError(f"not a T5 vocabulary: it starts with {[p for p, _ in pieces[:3]]}, not {_SPECIAL}")
        self._tokenizer = Tokenizer(Unigram(list(pieces), unk_id=_UNK, byte_fallback=False))
        if charsmap:
            self._tokenizer.normalizer = normalizers.Precompiled(charsmap)
        # each word gets its own leading ▁, so white space around special tokens never matters
        metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
        special = [p for i, (p, _) in enumerate(pieces) if i < 3 or p.startswith("<extra_id_")]
        self._tokenizer.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in special])

    @classmethod
    def load(cls, folder: str | Path) -> TextTokenizer:
        """From a folder with `spiece.model` or `tokenizer.json`; CheckpointError where neither is there or readable."""
        for name, read in zip(TOKENIZER_FILES, (_read_spiece, _read_json), strict=True):
            path = Path(folder) / name
            if not path.is_file():
                continue
            try:
                return cls(*read(path))
            except (ValueError, LookupError, TypeError, struct.error) as error:
                raise CheckpointError(f"{path} cannot be read as a T5 vocabulary: {error}") from error
        raise CheckpointError(f"no T5 vocabulary in {folder}: looked for {' and '.join(TOKENIZER_FILES)}; {_HINT}")

    def ids(self, text: str) -> list[int]:
        """Ids of `text` and the closing 1; "" gives [1]. Nothing is cut and nothing is lower-cased.

        TypeError for what is no text, ValueError for half a surrogate pair.
        """
        if not isinstance(text, str):
            raise TypeError(f"a text must be a str, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text holds half a surrogate pair at character {error.start}") from error
        return [*self._tokenizer.encode(text, add_special_tokens=False).ids, _EOS]

    @property
    def vocab_size(self) -> int:
        """Ids that can occur: 32100 for the released T5s (their embeddings have 32128 rows)."""
        return self._tokenizer.get_vocab_size()


def _read_json(path: Path) -> tuple[list[tuple[str, float]], bytes | None]:
    """(pieces, charsmap) of a tokenizer.json; everything else in it is fixed for T5."""
    import base64

    content = json.loads(path.read_text(encoding="utf-8"))
    if content["model"].get("type", "Unigram") != "Unigram":
        raise ValueError(f"its model is {content['model']['type']}, not Unigram")
    normalizer = content.get("normalizer") or {}
    for part in normalizer.get("normalizers", [normalizer]):
        if part.get("type") == "Precompiled":
            charsmap = base64.b64decode(part["precompiled_charsmap"])
            break
    else:
        charsmap = None
    return [(piece, score) for piece, score in content["model"]["vocab"]], charsmap


def _read_spiece(path: Path) -> tuple[list[tuple[str, float]], bytes | None]:
    """(pieces, charsmap) of a SentencePiece file, the sentinels added.

    The file is a protobuf of which three fields matter, so twenty lines stand in for the `protobuf` package.
    """
    pieces: list[tuple[str, float]] = []
    normalizer = None
    for number, value in _protobuf(memoryview(path.read_bytes())):
        if number == 1:  # a piece: 1 its text, 2 its score
            fields = dict(_protobuf(value))
            pieces.append((bytes(fields[1]).decode(), struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0))
        elif number == 2 and dict(_protobuf(value)).get(3, 1) != 1:  # the trainer: 3 the kind of model
            raise ValueError("it is a SentencePiece model, but not of the unigram kind")
        elif number == 3:  # the normalizer: 2 its table
            normalizer = bytes(dict(_protobuf(value)).get(2, b""))
    if normalizer is None:
        raise ValueError("it is not a SentencePiece file, or it is cut short")
    return pieces + [(f"<extra_id_{i}>", 0.0) for i in reversed(range(_EXTRA_IDS))], normalizer or None


def _protobuf(data: memoryview) -> Iterator[tuple[int, Any]]:
    """(field number, value) of one message: ints for varints, memoryviews for the rest."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or (varint() if key & 7 == 2 else -1)
        if size < 0 or position + size > len(data):
            raise ValueError("it is not a SentencePiece file, or it is cut short")
        yield key >> 3, data[position : position + size]
        position += size


class TextEncoder:
    """A T5 encoder with its tokenizer; float32 on any device, no gradients, the last texts cached.

    Args:
        model: transformers' `T5EncoderModel`; moved to `device` and float32.
        tokenizer: of the same T5.
    """

    def __init__(self, model: Any, tokenizer: SupportsIds, device: str | torch.device = "cpu"):
        self.model = model.to(device=device, dtype=torch.float32).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    @classmethod
    def from_weights(
        cls,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        tokenizer_folder: str | Path,
        device: str | torch.device = "cpu",
    ) -> TextEncoder:
        """From the `text_encoder` part of a transformers MusicGen checkpoint.

        Args:
            config: the `text_encoder` dict of its config.json.
            tensors: its tensors without the `text_encoder.` in front. The embedding may go by either of its names,
                `shared.weight` or `encoder.embed_tokens.weight`; any other difference is a CheckpointError.
            tokenizer_folder: where `TextTokenizer.load` looks.
        """
        tokenizer = TextTokenizer.load(tokenizer_folder)
        return cls(build_t5(config, tensors, device), tokenizer, device)

    @property
    def dim(self) -> int:
        """Width D of the states."""
        return int(self.model.config.d_model)

    def encode(self, text: str | None) -> Tensor | None:
        """Last hidden state [n, D] float32 of one text, on `device`; None for None and "".

        None stands for audiocraft's empty condition: one position whose state is zero *after* the projection, bias
        included. Only the empty string is empty: " " has the same id [1] but counts as a text, as in audiocraft.
        The tensor may come from the cache and be handed out again: do not write to it.
        """
        if text is None or text == "":
            return None
        states = self._cache.pop(text, None)  # single dict operations: threads may race, and at worst encode twice
        if states is not None:
            self._cache[text] = states
            return states
        ids = torch.tensor([self.tokenizer.ids(text)], device=self.device)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            states = self.model(input_ids=ids).last_hidden_state[0]
        self._cache[text] = states
        while len(self._cache) > _CACHED_TEXTS or sum(map(len, list(self._cache.values()))) > _CACHED_ROWS:
            self._cache.popitem(last=False)
        return states


def build_t5(config: Mapping[str, Any], tensors: Mapping[str, Tensor], device: str | torch.device = "cpu") -> Any:
    """A transformers T5EncoderModel around weights; see `TextEncoder.from_weights`."""
    from transformers import T5Config, T5EncoderModel

    kind = config.get("model_type", "t5")
    if kind != "t5":
        raise CheckpointError(f"the text encoder of this checkpoint is a {kind!r}; only T5 encoders are supported")
    with torch.device("meta"):  # t5-base: 0.03 s instead of 4 s: no weight is drawn only to be replaced
        model = T5EncoderModel(T5Config.from_dict(dict(config)))
    # same-dtype tensors of a mapped file stay where they are: `.to` copies only what it must change
    weights = {name: tensor.to(device=device, dtype=torch.float32) for name, tensor in tensors.items()}
    names = ("shared.weight", "encoder.embed_tokens.weight")
    shared = next((weights[n] for n in names if n in weights), None)
    if shared is not None:
        weights.update(dict.fromkeys(names, shared))
    _load_strictly(model, weights, "the text encoder of this checkpoint")
    model.tie_weights()
    return model


def _load_strictly(model: torch.nn.Module, weights: dict[str, Tensor], what: str) -> None:
    """Assign `weights` to a model on the meta device; CheckpointError names what does not fit."""
    expected = model.state_dict()
    problems = {
        "missing": sorted(expected.keys() - weights.keys()),
        "unknown": sorted(weights.keys() - expected.keys()),
        "of another shape": sorted(n for n, w in weights.items() if n in expected and expected[n].shape != w.shape),
    }
    found = [f"{label}: {_some(names)}" for label, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{what} does not fit its configuration; {'; '.join(found)}")
    model.load_state_dict(weights, strict=True, assign=True)


def _some(names: Sequence[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
