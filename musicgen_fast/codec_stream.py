"""EnCodec's decode for codes that come in pieces: together the pieces are the decode of the whole, sample for sample.

codes int64 [B, K, t] in, float [B, channels, n] out; audio of a frame is complete once `look_ahead` more frames are
there (4 for MusicGen's codec), and what a piece costs does not depend on what came before. The layers are in
`seanet/streaming.py`; here are the checks, stereo, the counters, and states to save. Delay patterns are not known here.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from .codec import EnCodec, InterleaveStereo
from .seanet import DecoderStream

__all__ = ["StreamingDecoder"]

State = dict[str, Tensor | int]
_FORMAT = 1


class StreamingDecoder:
    """One stream of `batch` rows: any number of `push`, then `finish`.

    The concatenation of what they return equals `codec.decode` of all the codes, within the rounding of float32,
    however the codes are cut. Weights are the codec's own; leave its device and dtype alone while streams run.

    Args:
        codec: the model; of a stereo one, both channels run in one batch.
        batch: rows B of every `push`.
    """

    def __init__(self, codec: EnCodec | InterleaveStereo, batch: int = 1) -> None:
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch must be an integer of 1 or more, got {batch!r}")
        self._stereo = isinstance(codec, InterleaveStereo)
        self._mono: EnCodec = codec.model if isinstance(codec, InterleaveStereo) else codec
        self._codec, self._batch = codec, batch
        self._stream = DecoderStream(self._mono.decoder, 2 * batch if self._stereo else batch)
        self._books = self._frames = self._emitted = 0  # _books: 0 until the first push
        self._finished = False

    @property
    def look_ahead(self) -> int:
        """Frames that must follow a frame, at most, before the last of its samples comes out."""
        return -(-self._stream.look_ahead // self._mono.config.hop_length)

    @property
    def emitted(self) -> int:
        """Samples returned so far, of each row and channel."""
        return self._emitted

    @property
    def pending(self) -> int:
        """Frames given whose samples are not all out yet: up to `look_ahead`, 0 after `finish`."""
        return self._frames - self._emitted // self._mono.config.hop_length

    @torch.no_grad()
    def push(self, codes: Tensor) -> Tensor:
        """Samples that these codes complete: float [B, channels, n], n >= 0.

        Args:
            codes: integers [B, K, t], t >= 1, with the K of the first call (see `EnCodec.decode`); ValueError if not,
                and the stream is as it was. A multiple of the hop comes out once the first frames are complete.
        """
        self._open("push")
        if codes.dim() == 3 and codes.shape[0] != self._batch:
            raise ValueError(f"this stream has {self._batch} rows, got codes {list(codes.shape)}")
        if codes.dim() == 3 and self._books and codes.shape[1] != self._books:
            raise ValueError(f"this stream began with {self._books} codebooks, got codes {list(codes.shape)}")
        frames = codes.shape[-1] if codes.dim() else 0
        latents = self._latents(codes)
        self._books = codes.shape[1]
        self._frames += frames
        return self._sound(self._stream.push(latents))

    @torch.no_grad()
    def finish(self) -> Tensor:
        """The end of the sound, float [B, channels, n] (n = 0 if there was no push); the stream is over after it."""
        self._open("finish")
        self._finished = True
        book = self._mono.codebooks[0]
        if not self._frames:
            return book.new_empty(self._batch, self._codec.channels, 0)
        nothing = book.new_empty(2 * self._batch if self._stereo else self._batch, 0, book.shape[1])
        return self._sound(self._stream.push(nothing, last=True))

    def _open(self, what: str) -> None:
        if self._finished:
            raise ValueError(f"{what} after finish: this stream is over, make another StreamingDecoder")

    def _latents(self, codes: Tensor) -> Tensor:
        """Checked codes [B, K, t] -> [B or 2 B, t, dimension]."""
        if isinstance(self._codec, InterleaveStereo):
            codes = torch.stack(self._codec.get_left_right_codes(codes), dim=1).flatten(0, 1)
        return self._mono.decode_latent(codes).transpose(1, 2)

    def _sound(self, samples: Tensor) -> Tensor:
        """[B or 2 B, n, channels of one pass] -> [B, channels, n], counted."""
        count = samples.shape[1]
        self._emitted += count
        sound = samples.transpose(1, 2).contiguous()
        return sound.view(self._batch, 2, count) if self._stereo else sound

    # ---- saving and restoring

    def state(self) -> State:
        """A copy of where the stream is: tensors and ints, fit for torch.save and torch.load(weights_only=True).

        A few hundred KiB a row for MusicGen's codec. The weights are not in it: only their sizes.
        """
        counters = {"books": self._books, "frames": self._frames, "emitted": self._emitted}
        return {**self._identity(), **counters, "finished": int(self._finished), **self._stream.state()}

    def restore(self, state: State) -> None:
        """Go on where a `state` was taken, here or in another process or on another device.

        The codec must have the weights of the one before, which is not checked; other sizes, another batch or dtype are
        a ValueError, and leave this stream as it was.
        """
        for name, mine in self._identity().items():
            value = state.get(name)
            if not isinstance(value, int) or value != mine:
                raise ValueError(f"the state does not fit this decoder: {name} is {value} there and {mine} here")
        counters = []
        for name in ("books", "frames", "emitted", "finished"):
            value = state.get(name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"the state is damaged: {name} is {value!r}")
            counters.append(value)
        self._stream.restore(state)
        self._books, self._frames, self._emitted = counters[:3]
        self._finished = bool(counters[3])

    def _identity(self) -> dict[str, int]:
        """What a state and a decoder must have in common."""
        config = self._mono.config
        sizes = {f"codec.{name}": value for name, value in asdict(config).items() if isinstance(value, int)}
        ratios = {f"codec.ratio {i}": ratio for i, ratio in enumerate(config.ratios)}
        sizes["codec.reflects"], sizes["codec.interleaved"] = int(config.pad_mode == "reflect"), int(self._stereo)
        return {"format": _FORMAT, **sizes, **ratios, "batch": self._batch}
