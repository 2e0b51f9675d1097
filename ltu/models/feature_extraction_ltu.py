"""Converts 16 kHz waveforms into the spectrograms that the audio encoders take.

A spectrogram has 1024 frames of 10 ms.

LTU uses a Kaldi filterbank of 128 bins. The filterbank is padded with zeros or cut to 1024 frames,
and only then normalised, so padding becomes 1.1329, which is not silence. The mean of the whole
waveform is subtracted first, also if the clip is then cut.

YAMNet uses 64 log-mel bins. A clip shorter than a chunk is repeated, because silence would dominate
its audio tokens.
"""

from functools import lru_cache

import numpy as np
import torch
from torchaudio.compliance import kaldi
from transformers import AutoFeatureExtractor, BatchFeature, SequenceFeatureExtractor

from ltu.data.audio import (
    MIN_SAMPLES,
    SAMPLING_RATE,
    AudioError,
    AudioSource,
    Downmix,
    load_audio,
)
from ltu.models.configuration_ltu import CavMaeConfig, YamnetConfig
from ltu.models.stock_arguments import resolve_clip

FRAME_LENGTH = 400  # Samples of a frame, 25 ms.
FRAME_SHIFT = 160  # Samples from one frame to the next, 10 ms.


class ChunkedFeatureExtractor(SequenceFeatureExtractor):
    """Converts waveforms of any length into features of chunks of a fixed length.

    Subclasses define `chunk_step`, `extract_chunks` and `spectrogram`.
    """

    model_input_names = ["input_features"]
    downmix: Downmix = "first"  # How several channels of a clip become one.

    @property
    def chunk_step(self) -> int:
        """Samples from one chunk to the next, at `SAMPLING_RATE`."""
        raise NotImplementedError

    @property
    def chunk_seconds(self) -> float:
        """Seconds of a chunk, the part of a clip that is encoded at once."""
        return self.chunk_step / SAMPLING_RATE

    def __call__(
        self,
        raw_speech: np.ndarray | list[np.ndarray],
        sampling_rate: int = SAMPLING_RATE,
        return_tensors: str | None = "pt",
        num_chunks: list[int] | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Convert waveforms into features.

        Args:
            raw_speech: one mono waveform `(samples,)`, or a list of them, each of at least 25 ms.
            sampling_rate: in Hz; must be 16 kHz. `ltu.data.audio.load_audio` resamples.
            return_tensors: "pt" for torch, "np" for numpy.
            num_chunks: the number of chunks of each clip, at most `count_chunks`; by default one.

        Returns:
            `input_features`, float32, by default `(chunks of all clips, num_frames, num_mel_bins)`.

        Raises:
            ValueError: another sampling rate, or a waveform that is not mono.
            ltu.data.audio.AudioError: a waveform is shorter than 25 ms.
        """
        if sampling_rate != SAMPLING_RATE:
            raise ValueError(
                f"Waveforms must have {SAMPLING_RATE} Hz, got {sampling_rate} Hz. "
                "Load the clip with ltu.data.audio.load_audio, which resamples."
            )
        if not isinstance(raw_speech, list | tuple):
            raw_speech = [raw_speech]
        waveforms = [torch.as_tensor(clip, dtype=torch.float32) for clip in raw_speech]
        for number, waveform in enumerate(waveforms):
            if waveform.ndim != 1:
                raise ValueError(
                    f"Clip {number} has shape {tuple(waveform.shape)}; a waveform is (samples,), "
                    "mono."
                )
            if len(waveform) < MIN_SAMPLES:
                milliseconds = 1000 * len(waveform) / SAMPLING_RATE
                raise AudioError(
                    f"<waveform {number}>", "too_short", f"{milliseconds:.1f} ms of sound"
                )
        counts = num_chunks or [1] * len(waveforms)
        features = [
            self.extract_chunks(waveform, count)
            for waveform, count in zip(waveforms, counts, strict=True)
        ]
        return BatchFeature(
            {"input_features": torch.cat(features).numpy()}, tensor_type=return_tensors
        )

    def fetch_audio(self, audio: AudioSource | list[AudioSource]) -> np.ndarray | list[np.ndarray]:
        """Load clips as mono waveforms, (samples,) at the rate of the extractor.

        The stock method, which the pipeline "any-to-any" calls, needs other libraries to decode.
        """
        if isinstance(audio, list):
            return [self.fetch_audio(clip) for clip in audio]
        return load_audio(resolve_clip(audio), self.downmix)

    def count_chunks(self, samples: int) -> int:
        """Return the number of chunks of a clip, of which the last may be shorter.

        A rest of less than 25 ms is no chunk.
        """
        return max(1, -(-(samples - MIN_SAMPLES + 1) // self.chunk_step))

    def extract_chunks(self, waveform: torch.Tensor, num_chunks: int) -> torch.Tensor:
        """Return features of the first chunks of a waveform.

        Args:
            waveform: `(samples,)`, 16 kHz.
            num_chunks: at most `count_chunks`.

        Returns:
            `(chunks, *feature_shape of the audio encoder's config)`
        """
        raise NotImplementedError

    def spectrogram(self, waveform: torch.Tensor) -> torch.Tensor:
        """Return the log-mel spectrogram `(frames, bins)` of a waveform `(samples,)`."""
        raise NotImplementedError


class SpectrogramFeatureExtractor(ChunkedFeatureExtractor):
    """Converts waveforms into spectrograms of a fixed number of frames.

    Subclasses define `extract_features`.
    """

    def __init__(
        self, num_mel_bins: int, num_frames: int, sampling_rate: int, padding_value: float, **kwargs
    ):
        # The base class saves feature_size too, which is num_mel_bins here.
        kwargs.pop("feature_size", None)
        super().__init__(
            feature_size=num_mel_bins,
            sampling_rate=sampling_rate,
            padding_value=padding_value,
            **kwargs,
        )
        self.num_mel_bins = num_mel_bins
        self.num_frames = num_frames

    @property
    def chunk_step(self) -> int:
        return self.num_frames * FRAME_SHIFT

    @property
    def chunk_samples(self) -> int:
        """Samples of `num_frames` frames; the last frame reaches 15 ms into the next chunk."""
        return FRAME_LENGTH + (self.num_frames - 1) * FRAME_SHIFT

    def extract_chunks(self, waveform: torch.Tensor, num_chunks: int) -> torch.Tensor:
        """Return features `(chunks, num_frames, num_mel_bins)` of a waveform `(samples,)`."""
        starts = range(0, num_chunks * self.chunk_step, self.chunk_step)
        return torch.stack([self.extract_features(waveform[start:]) for start in starts])

    def extract_features(self, waveform: torch.Tensor) -> torch.Tensor:
        """Return features `(num_frames, num_mel_bins)` of a waveform `(samples,)`."""
        raise NotImplementedError

    def spectrogram(self, waveform: torch.Tensor) -> torch.Tensor:
        num_chunks = self.count_chunks(len(waveform))
        frames = self.extract_chunks(waveform, num_chunks).flatten(0, 1).float()
        # Cut off the padding of the last chunk. The last frame reaches 15 ms over its shift.
        num_frames = (len(waveform) - FRAME_LENGTH + FRAME_SHIFT) // FRAME_SHIFT
        return frames[: max(1, num_frames)]  # (frames, bins)


class LtuFeatureExtractor(SpectrogramFeatureExtractor):
    """The filterbank that CAV-MAE takes.

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
        num_padding = self.num_frames - len(filterbank)
        filterbank = torch.nn.functional.pad(
            filterbank, (0, 0, 0, num_padding), value=self.padding_value
        )
        return (filterbank - self.mean) / self.std  # (num_frames, bins)


class YamnetFeatureExtractor(SpectrogramFeatureExtractor):
    """The log-mel spectrogram that YAMNet takes.

    Its parameters are those of tensorflow/models, research/audioset/yamnet/params.py.

    Args:
        loop_short_clips: repeat a clip that is shorter than a chunk; otherwise pad it with silence.
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
        """Return the log-mel `(frames, num_mel_bins)` of a waveform `(samples,)` of any length."""
        n_fft = 512  # The next power of two over the 400 samples of a frame.
        frames = waveform.unfold(0, FRAME_LENGTH, FRAME_SHIFT)  # (frames, 400)
        frames = frames * torch.hann_window(FRAME_LENGTH)
        magnitude = torch.fft.rfft(frames, n_fft).abs()  # (frames, 257)
        bands = mel_bands(
            self.sampling_rate, n_fft, self.num_mel_bins, self.mel_min_hz, self.mel_max_hz
        )
        return torch.log(magnitude @ bands + self.log_offset)  # (frames, bins)


@lru_cache(maxsize=4)
def mel_bands(
    sampling_rate: int, n_fft: int, num_mel_bins: int, min_hz: float, max_hz: float
) -> torch.Tensor:
    """Return triangular mel bands, float32 `(n_fft // 2 + 1, num_mel_bins)`.

    The mel scale is HTK's, and the sides of the triangles are straight on this scale.
    """

    def mel(hertz: np.ndarray | float) -> np.ndarray:
        return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)

    bins = mel(np.linspace(0.0, sampling_rate / 2, n_fft // 2 + 1))[:, None]  # (257, 1)
    edges = np.linspace(mel(min_hz), mel(max_hz), num_mel_bins + 2)
    lower = edges[:-2]
    centre = edges[1:-1]
    upper = edges[2:]
    rising = (bins - lower) / (centre - lower)
    falling = (upper - bins) / (upper - centre)
    bands = np.minimum(rising, falling).clip(min=0.0)
    bands[0] = 0.0  # A constant offset of the waveform is not audible.
    return torch.from_numpy(bands).float()


AutoFeatureExtractor.register(CavMaeConfig, LtuFeatureExtractor)
AutoFeatureExtractor.register(YamnetConfig, YamnetFeatureExtractor)
