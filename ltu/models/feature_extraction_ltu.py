"""16 kHz waveform to the picture that an ear looks at: 1024 frames of 10 ms.

Notable:
- LTU: 128 Kaldi filterbank bins, padded with zeros or cut to 1024 frames and only then normalised, so padding becomes
  1.1329, which is not silence;
- the mean of the *whole* clip is subtracted, also from a clip that is then cut;
- YAMNet: 64 log-mel bins; a clip shorter than the chunk is repeated, because silence would dominate its tokens.
"""

from functools import lru_cache

import numpy as np
import torch
from torchaudio.compliance import kaldi
from transformers import AutoFeatureExtractor, BatchFeature, SequenceFeatureExtractor

from ltu.data.audio import MIN_SAMPLES, SAMPLING_RATE, AudioError
from ltu.models.configuration_ltu import CavMaeConfig, YamnetConfig

FRAME_LENGTH = 400  # samples, 25 ms: chunk of both front ends
FRAME_SHIFT = 160  # samples, 10 ms


class ChunkedFeatureExtractor(SequenceFeatureExtractor):
    """Waveforms of any length to `(clips, num_frames, num_mel_bins)`; subclasses define `extract_features`."""

    model_input_names = ["input_features"]

    def __init__(
        self, num_mel_bins: int, num_frames: int, sampling_rate: int, padding_value: float, **kwargs
    ):
        kwargs.pop(
            "feature_size", None
        )  # Written to disk by the base class; num_mel_bins is its one home here.
        super().__init__(
            feature_size=num_mel_bins,
            sampling_rate=sampling_rate,
            padding_value=padding_value,
            **kwargs,
        )
        self.num_mel_bins = num_mel_bins
        self.num_frames = num_frames

    @property
    def chunk_seconds(self) -> float:
        """Seconds of a clip that the ear hears; what comes later is cut off."""
        return self.num_frames * FRAME_SHIFT / self.sampling_rate

    @property
    def chunk_samples(self) -> int:
        """Samples that give exactly `num_frames` frames (the last frame reaches 15 ms over its shift)."""
        return FRAME_LENGTH + (self.num_frames - 1) * FRAME_SHIFT

    def __call__(
        self,
        raw_speech: np.ndarray | list[np.ndarray],
        sampling_rate: int = SAMPLING_RATE,
        return_tensors: str | None = "pt",
        num_chunks: list[int] | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Turn waveforms into features.

        Args:
            raw_speech: one waveform `(samples,)`, mono, or a list of them, of any lengths from 25 ms.
            sampling_rate: in Hz; must be the extractor's. `ltu.data.audio.load_audio` resamples.
            return_tensors: "pt" for torch, "np" for numpy.
            chunks: how many chunks of each clip are heard, by default the first; at most `count_chunks`.

        Returns:
            `input_features`, float32 `(clips, num_frames, num_mel_bins)`, where each chunk counts as a clip.
        """
        if sampling_rate != self.sampling_rate:
            raise ValueError(
                f"The features are defined at {self.sampling_rate} Hz, got {sampling_rate} Hz. Load the clip with "
                "ltu.data.audio.load_audio, which resamples."
            )
        is_single = not isinstance(raw_speech, list | tuple)
        waveforms = [
            torch.as_tensor(clip, dtype=torch.float32)
            for clip in ([raw_speech] if is_single else raw_speech)
        ]
        for number, waveform in enumerate(waveforms):
            if waveform.ndim != 1:
                raise ValueError(
                    f"Clip {number} has shape {tuple(waveform.shape)}; a waveform is (samples,), mono."
                )
            if len(waveform) < MIN_SAMPLES:
                milliseconds = 1000 * len(waveform) / self.sampling_rate
                raise AudioError(
                    f"<waveform {number}>", "too_short", f"{milliseconds:.1f} ms of sound"
                )
        heard = zip(waveforms, num_chunks or [1] * len(waveforms), strict=True)
        features = torch.cat([self.extract_chunks(waveform, count) for waveform, count in heard])
        return BatchFeature({"input_features": features.numpy()}, tensor_type=return_tensors)

    def count_chunks(self, samples: int) -> int:
        """Windows that a clip fills, the last in part; what is left of it under 25 ms is none."""
        return max(1, -(-(samples - MIN_SAMPLES + 1) // (self.num_frames * FRAME_SHIFT)))

    def extract_chunks(self, waveform: torch.Tensor, num_chunks: int) -> torch.Tensor:
        """`(samples,)` → `(chunks, num_frames, num_mel_bins)`, one chunk after the other."""
        starts = range(0, num_chunks * self.num_frames * FRAME_SHIFT, self.num_frames * FRAME_SHIFT)
        return torch.stack([self.extract_features(waveform[start:]) for start in starts])

    def extract_features(self, waveform: torch.Tensor) -> torch.Tensor:
        """`(samples,)` → `(num_frames, num_mel_bins)`"""
        raise NotImplementedError


class LtuFeatureExtractor(ChunkedFeatureExtractor):
    """The filterbank that CAV-MAE reads.

    Args:
        mean, std: statistics of AudioSet's filterbanks; features are `(filterbank - mean) / std`.
    """

    def __init__(
        self,
        num_mel_bins: int = 128,
        num_frames: int = 1024,
        sampling_rate: int = SAMPLING_RATE,
        padding_value: float = 0.0,
        mean: float = -5.081,
        std: float = 4.4849,
        **kwargs,
    ):
        super().__init__(num_mel_bins, num_frames, sampling_rate, padding_value, **kwargs)
        self.mean = mean
        self.std = std

    def extract_features(self, waveform: torch.Tensor) -> torch.Tensor:
        waveform = (waveform - waveform.mean())[: self.chunk_samples]
        filterbank = kaldi.fbank(
            waveform[None],
            htk_compat=True,
            sample_frequency=self.sampling_rate,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=self.num_mel_bins,
            dither=0.0,
            frame_shift=1000 * FRAME_SHIFT / self.sampling_rate,
        )  # (frames, bins)
        missing = self.num_frames - len(filterbank)
        padded = torch.nn.functional.pad(
            filterbank, (0, 0, 0, missing), value=self.padding_value
        )  # (num_frames, bins)
        return (padded - self.mean) / self.std


class YamnetFeatureExtractor(ChunkedFeatureExtractor):
    """The log-mel picture that YAMNet reads (parameters: tensorflow/models, research/audioset/yamnet/params.py).

    Args:
        loop_short_clips: repeat a clip that is shorter than the chunk until it fills it; otherwise silence follows.
        log_offset: added before the logarithm.
        mel_min_hz, mel_max_hz: edges of the lowest and highest mel band.
    """

    def __init__(
        self,
        num_mel_bins: int = 64,
        num_frames: int = 1024,
        sampling_rate: int = SAMPLING_RATE,
        padding_value: float = 0.0,
        loop_short_clips: bool = True,
        log_offset: float = 0.001,
        mel_min_hz: float = 125.0,
        mel_max_hz: float = 7500.0,
        **kwargs,
    ):
        super().__init__(num_mel_bins, num_frames, sampling_rate, padding_value, **kwargs)
        self.loop_short_clips = loop_short_clips
        self.log_offset = log_offset
        self.mel_min_hz = mel_min_hz
        self.mel_max_hz = mel_max_hz

    def extract_features(self, waveform: torch.Tensor) -> torch.Tensor:
        missing = self.chunk_samples - len(waveform)
        if missing > 0 and self.loop_short_clips:
            waveform = waveform.repeat(-(-self.chunk_samples // len(waveform)))
        elif missing > 0:
            waveform = torch.nn.functional.pad(waveform, (0, missing), value=self.padding_value)
        return self.log_mel(waveform[: self.chunk_samples])

    def log_mel(self, waveform: torch.Tensor) -> torch.Tensor:
        """`(samples,)` → `(frames, num_mel_bins)`, without padding or cutting."""
        n_fft = 512  # the next power of two over the 400 samples of a frame
        frames = waveform.unfold(0, FRAME_LENGTH, FRAME_SHIFT) * torch.hann_window(
            FRAME_LENGTH
        )  # (frames, 400)
        magnitude = torch.fft.rfft(frames, n_fft).abs()  # (frames, 257)
        bands = mel_bands(
            self.sampling_rate, n_fft, self.num_mel_bins, self.mel_min_hz, self.mel_max_hz
        )
        return torch.log(magnitude @ bands + self.log_offset)  # (frames, bins)


@lru_cache(maxsize=4)
def mel_bands(
    sampling_rate: int, n_fft: int, num_mel_bins: int, min_hz: float, max_hz: float
) -> torch.Tensor:
    """Triangular bands on the HTK mel scale, straight in mel, float32 `(n_fft // 2 + 1, num_mel_bins)`."""

    def mel(hertz: np.ndarray | float) -> np.ndarray:
        return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)

    bins = mel(np.linspace(0.0, sampling_rate / 2, n_fft // 2 + 1))[:, None]  # (257, 1)
    edges = np.linspace(mel(min_hz), mel(max_hz), num_mel_bins + 2)
    lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
    bands = np.minimum((bins - lower) / (centre - lower), (upper - bins) / (upper - centre)).clip(
        min=0.0
    )
    bands[0] = 0.0  # A constant offset of the waveform carries no sound.
    return torch.from_numpy(bands).float()


AutoFeatureExtractor.register(CavMaeConfig, LtuFeatureExtractor)
AutoFeatureExtractor.register(YamnetConfig, YamnetFeatureExtractor)
