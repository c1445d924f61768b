"""EnCodec: waveforms to codes and back, with the interface of audiocraft's compression models.

codes are int64 [B, K, T], T frames of `hop_length` samples; waveforms float [B, channels, n]. The network is in
`seanet.py`; here are the residual codebooks, the checks of what users pass, and stereo as two mono passes in one
batch. Weights come from `checkpoints.codec_weights`; nothing here reads files. Streaming is not done here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import CodecConfig
from .seanet import Decoder, Encoder

__all__ = ["EnCodec", "InterleaveStereo"]

_SEARCH_FRAMES = 4096  # distances to 2048 codes are 8 KiB a frame


class EnCodec(nn.Module):
    """A mono or stereo EnCodec: SEANet around residual vector quantisation (audiocraft `EncodecModel`;
    Défossez et al. 2022).

    Build it (cheaply on the meta device) and load canonical weights with `load_state_dict(weights, assign=True)`, then
    move it with `.to(device)`. Inference only: no gradients. Parameters: the keys listed in `codec_weights.py`.
    ValueError for a `pad_mode` in the configuration that is neither 'reflect' nor 'constant'.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        if config.pad_mode not in ("reflect", "constant"):
            raise ValueError(f"pad_mode must be 'reflect' or 'constant', got {config.pad_mode!r}")
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.codebooks = nn.ParameterList(
            nn.Parameter(torch.empty(config.codebook_size, config.dimension), requires_grad=False)
            for _ in range(config.num_codebooks)
        )
        self._active = config.num_codebooks

    @property
    def sample_rate(self) -> int:
        """Samples a second (Hz)."""
        return self.config.sample_rate

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return self.config.frame_rate

    @property
    def channels(self) -> int:
        """Channels of the waveforms."""
        return self.config.channels

    @property
    def num_codebooks(self) -> int:
        """Codebooks that `encode` uses."""
        return self._active

    @property
    def total_codebooks(self) -> int:
        """Codebooks that there are; `decode` takes any number up to it."""
        return self.config.num_codebooks

    @property
    def cardinality(self) -> int:
        """Codes in a codebook; valid codes are below it."""
        return self.config.codebook_size

    def set_num_codebooks(self, n: int) -> None:
        """Let `encode` stop after n codebooks; ValueError unless 1 <= n <= `total_codebooks`."""
        if not 1 <= n <= self.total_codebooks:
            raise ValueError(f"this codec has 1 to {self.total_codebooks} codebooks, got {n}")
        self._active = n

    @torch.no_grad()
    def encode(self, wav: Tensor) -> tuple[Tensor, None]:
        """Codes of a waveform.

        Args:
            wav: float [B, channels, n] at `sample_rate`; any n >= 1.

        Returns:
            codes [B, K, ceil(n / hop)] with K = `num_codebooks`, and None where audiocraft returns a volume.

        Raises:
            ValueError: another shape or dtype.
        """
        if wav.dim() != 3 or wav.shape[1] != self.channels or 0 in wav.shape or not wav.is_floating_point():
            raise ValueError(
                f"wav must be float [B, {self.channels}, n] with n >= 1, got {wav.dtype} {list(wav.shape)}; "
                "resample and mix down first"
            )
        wav = wav.to(self.codebooks[0].dtype)
        return self._quantize(self.encoder(wav.transpose(1, 2))), None

    @torch.no_grad()
    def decode(self, codes: Tensor, scale: None = None) -> Tensor:
        """Waveform of codes: float [B, channels, T hop].

        Args:
            codes: integers [B, K, T], 1 <= K <= `total_codebooks`, 0 <= code < `cardinality`.
            scale: what `encode` returned beside the codes: None.

        Raises:
            ValueError: another shape or dtype, codes out of range, a scale.
        """
        if scale is not None:
            raise ValueError("scale must be None: codecs that renormalise the volume are not supported")
        return self.decoder(self._embed(self._checked(codes))).transpose(1, 2).contiguous()

    @torch.no_grad()
    def decode_latent(self, codes: Tensor) -> Tensor:
        """Sum of the codebook entries: codes [B, K, T] -> float [B, dimension, T]; ValueError as for `decode`."""
        return self._embed(self._checked(codes)).transpose(1, 2)

    def _checked(self, codes: Tensor) -> Tensor:
        if codes.dim() != 3 or not 1 <= codes.shape[1] <= self.total_codebooks or 0 in codes.shape:
            raise ValueError(
                f"codes must be [B, K, T] with K from 1 to {self.total_codebooks} and T >= 1, got {list(codes.shape)}"
            )
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"codes must be integers, got {codes.dtype}")
        low, high = (int(bound) for bound in torch.aminmax(codes))
        if low < 0 or high >= self.cardinality:
            raise ValueError(
                f"codes must be from 0 to {self.cardinality - 1}, found {low if low < 0 else high}; "
                f"{self.cardinality} and -1 mark cells without a frame: cut them off before decoding"
            )
        return codes.long()

    def _embed(self, codes: Tensor) -> Tensor:
        """[B, K, T] -> [B, T, dimension]."""
        latents = F.embedding(codes[:, 0], self.codebooks[0])
        for k in range(1, codes.shape[1]):
            latents += F.embedding(codes[:, k], self.codebooks[k])
        return latents

    def _quantize(self, latents: Tensor) -> Tensor:
        """Nearest entries, each codebook on what the ones before left over: [B, T, dimension] -> [B, K, T]."""
        batch, frames, _ = latents.shape
        parts = [self._nearest(part) for part in latents.flatten(0, 1).split(_SEARCH_FRAMES)]
        return torch.cat(parts).view(batch, frames, -1).transpose(1, 2).contiguous()

    def _nearest(self, residual: Tensor) -> Tensor:
        """[N, dimension] -> codes [N, K]."""
        codes = []
        for book in list(self.codebooks)[: self._active]:
            # |x|^2 does not change which entry is nearest, but its rounding decides near-ties as in both references
            square = residual.pow(2).sum(1, keepdim=True)
            distance = square - 2 * residual @ book.t() + book.t().pow(2).sum(0, keepdim=True)
            codes.append(distance.neg_().max(dim=-1).indices)
            residual = residual - F.embedding(codes[-1], book)
        return torch.stack(codes, dim=1)


class InterleaveStereo(nn.Module):
    """A mono codec for stereo sound, codebooks in the order L0, R0, L1, R1, ... (audiocraft
    `InterleaveStereoCompressionModel`). Both channels run as one batch: weights are read once.
    ValueError for a codec that is stereo itself."""

    def __init__(self, model: EnCodec) -> None:
        super().__init__()
        if model.channels != 1:
            raise ValueError(f"the wrapped codec must be mono, it has {model.channels} channels")
        self.model = model

    @property
    def config(self) -> CodecConfig:
        """Of the mono codec."""
        return self.model.config

    @property
    def sample_rate(self) -> int:
        """Samples a second (Hz)."""
        return self.model.sample_rate

    @property
    def frame_rate(self) -> float:
        """Frames a second, of both channels at once."""
        return self.model.frame_rate

    @property
    def channels(self) -> int:
        """Always 2."""
        return 2

    @property
    def num_codebooks(self) -> int:
        """Of both channels together."""
        return 2 * self.model.num_codebooks

    @property
    def total_codebooks(self) -> int:
        """Of ONE channel, as in audiocraft."""
        return self.model.total_codebooks

    @property
    def cardinality(self) -> int:
        """Codes in a codebook; valid codes are below it."""
        return self.model.cardinality

    def set_num_codebooks(self, n: int) -> None:
        """Codebooks of ONE channel, as in audiocraft."""
        self.model.set_num_codebooks(n)

    def encode(self, wav: Tensor) -> tuple[Tensor, None]:
        """wav [B, 2, n] -> (codes [B, 2 K, ceil(n / hop)], None); ValueError for what is not stereo."""
        if wav.dim() != 3 or wav.shape[1] != 2:
            raise ValueError(f"wav must be stereo, [B, 2, n], got {list(wav.shape)}")
        codes, scale = self.model.encode(wav.reshape(-1, 1, wav.shape[-1]))
        return codes.unflatten(0, (-1, 2)).transpose(1, 2).flatten(1, 2), scale

    def decode(self, codes: Tensor, scale: None = None) -> Tensor:
        """codes [B, 2 K, T] -> wav [B, 2, T hop]; `scale` must be None. ValueError as for the mono codec."""
        sides = torch.stack(self.get_left_right_codes(codes), dim=1)
        return self.model.decode(sides.flatten(0, 1), scale).view(codes.shape[0], 2, -1)

    def decode_latent(self, codes: Tensor) -> Tensor:
        """Two channels have no common latent: RuntimeError for codes of any shape, as in audiocraft."""
        raise RuntimeError("decode_latent of a stereo codec: take get_left_right_codes, then the mono codec")

    def get_left_right_codes(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """codes [B, 2 K, T] -> left and right, each [B, K, T]; ValueError for an odd number of codebooks."""
        if codes.dim() != 3 or codes.shape[1] % 2 or codes.shape[1] == 0:
            raise ValueError(f"stereo codes must be [B, 2 K, T], left and right in turn, got {list(codes.shape)}")
        return codes[:, 0::2], codes[:, 1::2]
