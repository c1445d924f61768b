"""SEANet, the convolutional encoder and decoder of EnCodec, with the LSTM between convolutions and codebooks.

Everything here is time-major, [B, T, C]. Non-causal, identity shortcuts, ELU, folded weight norm. `layers.py`: the
convolutions and the LSTM; `stacks.py`: encoder and decoder; `streaming.py`: the decoder over pieces of a stream. Knows
nothing of codebooks or files.
"""

from __future__ import annotations

from .stacks import Decoder, Encoder
from .streaming import DecoderStream

__all__ = ["Decoder", "DecoderStream", "Encoder"]
