"""The demo model's vocabulary: a T5 tokenizer trained on its captions, in files for transformers and musicgen_fast.

Some 150 pieces (whole words of `captions.py`, then single characters), folded to lower case by the tokenizer itself, so
that "Slow, with Drums" has the ids of "slow, with drums". Texts are str, ids are lists of int that end with 1 (</s>).
It does not know songs beyond their captions, nor the text encoder.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from pathlib import Path

from musicgen_fast.checkpoints import write

from .captions import caption
from .synth import compose

SENTINELS = 100  # ids behind the pieces that both tokenizers add; nothing was trained for them, but one can type them
_REQUIRED = string.ascii_lowercase + string.digits + ",.-'#"  # a word that no caption has is spelled, not <unk>
_CAPTIONS = 4000  # training texts: each of the lexicon's words occurs in at least a hundred


def training_captions(count: int = _CAPTIONS) -> list[str]:
    """Captions of the songs 0, 1, 2, ...; the same every time."""
    return [caption(compose(seed), seed) for seed in range(count)]


def train_vocabulary(texts: Iterable[str], size: int = 200) -> bytes:
    """The content of spiece.model: upper case is folded, and words that no caption has can be spelled."""
    texts = list(texts)
    # Pieces grow from strings that two different words share; with a comma behind it, every word is such a string.
    words = sorted({word.strip(",") for text in texts for word in text.split()})
    texts += [", ".join([*words, ""])] * 2
    return write.train_vocabulary(texts, size, fold_case=True, characters=_REQUIRED, mixed_words=True)


def write_tokenizer(folder: Path, model: bytes) -> None:
    """spiece.model, and what makes transformers' AutoTokenizer take it for a T5 tokenizer.

    No tokenizer.json: it would add 340 kB, and scores that pass through it are rounded (other ids where two
    segmentations tie).
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model)
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_ids": SENTINELS,
        "model_max_length": 256,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
