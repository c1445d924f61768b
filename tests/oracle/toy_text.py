"""A text encoder small enough for tests, shared by the references and this project: hashed words, a tiny random T5."""

from __future__ import annotations

from collections import UserDict

import torch

DIM, VOCAB = 24, 97


class ToyTokenizer:
    """Words hashed to ids 2..96, </s> = 1 appended, right-padded with 0; called as transformers' T5Tokenizer is."""

    def ids(self, text: str) -> list[int]:
        return [2 + sum((i + 1) * b for i, b in enumerate(w.encode())) % (VOCAB - 2) for w in text.split()] + [1]

    def __call__(self, texts, return_tensors=None, padding=True):
        rows = [self.ids(t) for t in texts]
        longest = max(map(len, rows))

        class Batch(UserDict):
            def to(self, device):
                self.data = {k: v.to(device) for k, v in self.data.items()}
                return self

        return Batch(
            input_ids=torch.tensor([r + [0] * (longest - len(r)) for r in rows]),
            attention_mask=torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows]),
        )


def tiny_t5(seed: int = 1234):
    """A random T5 encoder (transformers), width 24; the global random state is left as it was."""
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = T5Config(vocab_size=VOCAB + 3, d_model=DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
        return T5EncoderModel(config).eval()
