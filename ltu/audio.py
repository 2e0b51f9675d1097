"""Path, bytes or array to a mono 16 kHz waveform, or an error that says what is wrong with it.

Notable:
- channel 0 is used and the rate becomes 16 kHz with `torchaudio.functional.resample`, as in the original's demo;
- libsndfile decodes (wav, flac, ogg, mp3 and more), so no ffmpeg program is needed;
- nothing is ever made up for a clip that cannot be heard: `AudioError` has the source, a reason and the way out.
"""

import io
import os
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio.functional

SAMPLING_RATE = 16_000  # Hz
MIN_SAMPLES = 400  # 25 ms at 16 kHz: one window of the filterbank

WAYS_OUT = {
    "missing": "Check the path; relative paths are looked up from the data file or from --audio_root.",
    "unreadable": "Convert it to wav, flac, ogg or mp3, or leave it out.",
    "too_short": "Use a clip of at least 25 ms, or leave it out.",
    "damaged": "Remove its file of features and extract them again.",
    "silent": "Use a clip with sound in its first channel, or leave it out.",
}


class AudioError(ValueError):
    """A clip that cannot be heard.

    Attributes:
        source: the path, or a description of the bytes or array.
        reason: "missing", "unreadable", "too_short" or "silent".
    """

    def __init__(self, source: str, reason: str, detail: str):
        self.source = source
        self.reason = reason
        self.detail = detail
        super().__init__(f"{source}: {detail}. {WAYS_OUT[reason]}")

    def __reduce__(self):
        # Workers of a data loader pickle their errors; the default would call __init__ with the message alone.
        return type(self), (self.source, self.reason, self.detail)


def load_audio(source: str | Path | bytes | np.ndarray | tuple[np.ndarray, int]) -> np.ndarray:
    """Load a clip as mono 16 kHz.

    Args:
        source: a file, the bytes of one, or an array: `(samples,)` or `(channels, samples)`, at 16 kHz unless it comes
            as `(array, rate in Hz)`. Integer arrays are scaled by the range of their type, as a file of them would be.

    Returns:
        float32 `(samples,)`, the first channel, in [-1, 1] if the source was.

    Raises:
        AudioError: the clip is missing, unreadable (also: nan or infinity), shorter than 25 ms or constant.
    """
    if isinstance(source, str | Path):
        name = str(source)
        waveform, rate = _read_file(name)
    elif isinstance(source, bytes):
        name = f"<{len(source)} bytes>"
        waveform, rate = _decode(io.BytesIO(source), name)
    elif isinstance(source, np.ndarray | tuple):
        array, rate = source if isinstance(source, tuple) else (source, SAMPLING_RATE)
        name = f"<array of shape {tuple(array.shape)} at {rate} Hz>"
        waveform = _first_channel(array, name)
    else:
        raise TypeError(
            f"A clip is a path, bytes, an array or (array, rate in Hz), not {type(source).__name__}. "
            "Convert other types to a numpy array first."
        )
    if rate <= 0:
        raise AudioError(name, "unreadable", f"a sampling rate of {rate} Hz")
    if not np.isfinite(waveform).all():
        raise AudioError(name, "unreadable", "holds values that are not finite")
    _check_length(waveform, rate, name)
    if waveform.min() == waveform.max():
        raise AudioError(name, "silent", f"every sample of its first channel is {waveform[0]:g}")
    if rate != SAMPLING_RATE:
        resampled = torchaudio.functional.resample(torch.from_numpy(waveform), int(rate), SAMPLING_RATE)
        waveform = resampled.numpy()  # (samples at 16 kHz,)
    return waveform


def _read_file(path: str) -> tuple[np.ndarray, int]:
    if not os.path.isfile(path):  # pathlib's raises where a folder cannot be entered, or a name is too long.
        detail = "is a folder, not a file" if os.path.isdir(path) else "no such file"
        raise AudioError(path, "missing", detail)
    try:
        with open(path, "rb") as stream:
            return _decode(stream, path)
    except OSError as error:
        raise AudioError(path, "unreadable", str(error)) from error


def _decode(file: io.BufferedIOBase, name: str) -> tuple[np.ndarray, int]:
    try:
        waveform, rate = soundfile.read(file, dtype="float32", always_2d=True)  # (samples, channels)
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        reason = getattr(error, "error_string", str(error)).rstrip(". ")
        raise AudioError(name, "unreadable", f"libsndfile cannot decode it ({reason})") from error
    return np.ascontiguousarray(waveform[:, 0]), rate  # (samples,)


def _first_channel(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim not in (1, 2) or array.shape[0] == 0:
        raise AudioError(name, "unreadable", "an array must be (samples,) or (channels, samples)")
    if array.ndim == 2 and array.shape[0] > array.shape[1]:
        detail = "more channels than samples; an array must be (channels, samples), transpose it"
        raise AudioError(name, "unreadable", detail)
    waveform = array if array.ndim == 1 else array[0]  # (samples,)
    if np.issubdtype(waveform.dtype, np.signedinteger):
        return waveform.astype(np.float32) / (np.iinfo(waveform.dtype).max + 1.0)
    if not np.issubdtype(waveform.dtype, np.floating):
        raise AudioError(name, "unreadable", f"an array of {waveform.dtype}; use float or signed integers")
    return np.ascontiguousarray(waveform, dtype=np.float32)


def _check_length(waveform: np.ndarray, rate: int, name: str) -> None:
    # Rounded up as the resampler does, so that no clip passes here and is too short afterwards.
    samples = -(-len(waveform) * SAMPLING_RATE // int(rate))
    if samples < MIN_SAMPLES:
        raise AudioError(name, "too_short", f"{1000 * len(waveform) / rate:.1f} ms of sound")
