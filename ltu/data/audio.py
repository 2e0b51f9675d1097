"""Loads a clip (a path, bytes or an array) as a mono waveform at 16 kHz, or says why it cannot.

Channel 0 is used and resampled to 16 kHz with `torchaudio.functional.resample`, as in the demo of
the original. libsndfile decodes (wav, flac, ogg, mp3 and more), so no ffmpeg program is needed.

A clip is decoded and resampled in blocks: only its 16 kHz waveform is ever in memory as a whole.
The length that a header claims is not trusted.

A clip that cannot be decoded raises `AudioError`, which has the source, a reason and a hint. No
waveform is ever made up for it.

Float samples in the range of integers are used as they are, with one warning in each process: the
models were trained on samples within 1, but nothing proves that such a clip is wrong.
"""

import io
import logging
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio.functional

logger = logging.getLogger(__name__)

SAMPLING_RATE = 16_000  # Hz
MIN_SAMPLES = 400  # 25 ms at 16 kHz: one window of the filterbank
MAX_SECONDS = 3600.0

# Sampling rates that are accepted, in Hz; recordings have 8,000 to 768,000.
MIN_RATE = 1_000
MAX_RATE = 1_000_000

# Values per second, over all channels. Eight channels at 192 kHz have 1.5 million; the header of a
# small file can claim far more.
MAX_VALUES = 2**22
# Full scale of 32-bit audio; the filterbank overflows far above it.
LOUDEST = 2.0**31
# Peak of float samples above which a warning says that they are in the range of integers. A decoded
# mp3 whose loudest samples were clipped has up to 3.
LOUD = 8.0
# Full scales of integer audio of 16, 24 and 32 bits.
FULL_SCALES = (2**15, 2**23, 2**31)
# One step of 24-bit audio; below it the filterbanks of both models are at their floor.
QUIETEST = 2.0**-23
# Values decoded at once, and samples resampled at once: 16 MiB of float32.
BLOCK = 2**22
# Weights of torchaudio's resampling kernel: 44,100 Hz needs 76,000, but 44,101 Hz 706 million.
MAX_KERNEL = 2**20
# Defaults of torchaudio.functional.resample.
LOWPASS_FILTER_WIDTH = 6  # zero crossings of the sinc
ROLLOFF = 0.99  # cut-off, as a fraction of the Nyquist frequency

HINTS = {
    "missing": (
        "Check the path; relative paths are looked up from the dataset file or from --audio_root."
    ),
    "unreadable": "Convert it to wav, flac, ogg or mp3, or leave it out.",
    "too_short": "Use a clip of at least 25 ms, or leave it out.",
    "too_long": "Cut it into parts.",
    "damaged": "Remove its feature file and extract the features again.",
    "silent": "Use a clip with a signal in its first channel, or leave it out.",
}
# Characters that break a line or that UTF-8 cannot encode; file names may contain both.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
MAX_SHOWN_SOURCE = 500  # characters of a source in a message


class AudioError(ValueError):
    """A clip that cannot be loaded.

    The message is one line that UTF-8 can encode, whatever the name of the file is.

    Attributes:
        source: the path, or a description of the bytes or array.
        reason: a key of `HINTS`.
        detail: the cause in words, without the hint.
    """

    def __init__(self, source: str, reason: str, detail: str):
        self.source = source
        self.reason = reason
        self.detail = detail
        shown = source
        if len(source) > MAX_SHOWN_SOURCE:
            shown = f"{source[:240]}...{source[-240:]}"
        super().__init__(UNPRINTABLE.sub(_escape, f"{shown}: {detail}. {HINTS[reason]}"))

    def __reduce__(self):
        # The workers of a data loader pickle their errors. By default, unpickling would call
        # __init__ with the message alone.
        return type(self), (self.source, self.reason, self.detail)


def _escape(match: re.Match) -> str:
    return match[0].encode("unicode_escape").decode()


class LoudnessWarning:
    """Warns of the first clip of this process whose float samples are in the range of integers."""

    def __init__(self):
        self.is_given = False

    def give(self, name: str, peak: float) -> None:
        """Log the warning unless it was logged before.

        Args:
            name: path, or description of the bytes or array.
            peak: the largest absolute value of the samples, above `LOUD`.
        """
        if self.is_given:
            return
        self.is_given = True
        full_scale = next(scale for scale in FULL_SCALES if peak <= scale)
        shown = UNPRINTABLE.sub(_escape, name)
        logger.warning(
            "%s has float samples up to %.6g, where the models expect values within 1. They are "
            "used as they are. If they are %d-bit integers stored as floats, divide them by %d. "
            "Further clips of this kind are not reported.",
            shown,
            peak,
            full_scale.bit_length(),
            full_scale,
        )


_loudness_warning = LoudnessWarning()


@dataclass
class Waveform:
    """A decoded clip.

    Attributes:
        waveform: (samples,), float32, mono, 16 kHz.
        sampling_rate: rate of the source in Hz, before resampling.
        channels: number of channels of the source.
    """

    waveform: np.ndarray
    sampling_rate: int
    channels: int


OnBlock = Callable[[], None]
AudioSource = str | Path | bytes | np.ndarray | tuple[np.ndarray, int] | Waveform | None


@dataclass
class AudioClip:
    """A clip on its way through the audio encoder.

    Attributes:
        source: where the clip is loaded from.
        seconds: length of the clip.
        waveform: (samples,) at 16 kHz; None if the features were stored.
        features: stored features; None if there is a waveform.
        transcript: stored transcript, if there is one.
        sampling_rate: rate of the source in Hz, before resampling.
        channels: number of channels of the source.
        num_chunks: how many chunks of the clip are used.
        embeds: (num_chunks, num_audio_tokens, hidden), audio embeddings, once computed.
    """

    source: AudioSource
    seconds: float
    waveform: np.ndarray | None = None
    features: torch.Tensor | None = None
    transcript: str | None = None
    sampling_rate: int | None = None
    channels: int | None = None
    num_chunks: int = 1
    embeds: torch.Tensor | None = None


def load_audio(source: str | Path | bytes | np.ndarray | tuple[np.ndarray, int]) -> np.ndarray:
    """Return the waveform of `decode_audio`: float32 (samples,), mono, 16 kHz."""
    return decode_audio(source).waveform


def decode_audio(
    source: str | Path | bytes | np.ndarray | tuple[np.ndarray, int] | Waveform,
    max_seconds: float = MAX_SECONDS,
    on_block: OnBlock | None = None,
) -> Waveform:
    """Load a clip as a mono waveform at 16 kHz.

    Args:
        source: a file, the bytes of a file, or an array: (samples,) or (channels, samples), at
            16 kHz unless it is given as `(array, rate in Hz)`. Integer arrays are scaled by the
            range of their type, as the same samples in a file would be. A `Waveform` is returned
            unchanged.
        max_seconds: a clip that turns out to be longer while it is decoded is refused.
        on_block: called after each block of up to `BLOCK` values is decoded; what it raises ends
            decoding.

    Returns:
        a waveform of float32, the first channel, in [-1, 1] if the source was.

    Raises:
        AudioError: the clip is missing, unreadable (also: nan, infinity, an impossible rate),
            shorter than 25 ms, longer than `max_seconds`, or silent (constant up to less than one
            step of 24-bit audio).
        TypeError: the source has another type.
    """
    if isinstance(source, Waveform):
        return source
    if isinstance(source, str | Path):
        return _decode_file(str(source), max_seconds, on_block)
    if isinstance(source, bytes):
        return _decode(_Bytes(source), f"<{len(source)} bytes>", max_seconds, on_block)
    return _decode_array(source, max_seconds, on_block)


def _decode_array(
    source: np.ndarray | tuple[np.ndarray, int], max_seconds: float, on_block: OnBlock | None
) -> Waveform:
    array = source
    rate = SAMPLING_RATE
    if isinstance(source, tuple) and len(source) == 2:
        array, rate = source
    if not isinstance(array, np.ndarray):
        found = type(source).__name__
        if isinstance(source, tuple):
            found = [type(part).__name__ for part in source]
        raise TypeError(
            f"A clip is a path, bytes, an array or (array, rate in Hz), not {found}. "
            "Convert other types to a numpy array first."
        )
    name = f"<array of shape {tuple(array.shape)} at {rate} Hz>"
    waveform = _first_channel(array, name)
    blocks = (waveform[start : start + BLOCK] for start in range(0, len(waveform), BLOCK))
    channels = 1 if array.ndim == 1 else len(array)
    return _resample_and_check(blocks, rate, channels, name, max_seconds, on_block)


def _decode_file(path: str, max_seconds: float, on_block: OnBlock | None) -> Waveform:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise AudioError(path, "missing", "is a folder, not a file")
        if not stat.S_ISREG(status.st_mode):  # Opening a pipe or a device could block forever.
            raise AudioError(path, "unreadable", "is a pipe, socket or device, not a file")
        if status.st_size == 0:
            raise AudioError(path, "unreadable", "is an empty file")
        with open(path, "rb") as stream:
            # libsndfile gets a file descriptor. Given a name, it would take a `._` file of macOS
            # next to the clip for a part of the clip, and refuse an mp3.
            return _decode(stream.fileno(), path, max_seconds, on_block)
    except FileNotFoundError as error:
        raise AudioError(path, "missing", "no such file") from error
    except PermissionError as error:
        raise AudioError(path, "unreadable", "cannot be read: permission denied") from error
    except AudioError:
        raise
    except (OSError, ValueError) as error:
        # The name is at fault: too long, a loop of links, or characters that no name can have.
        cause = getattr(error, "strerror", None) or error
        raise AudioError(path, "missing", f"no such file ({cause})") from error


class _Bytes(io.BytesIO):
    """A stream that ignores a seek to before its start.

    A damaged file can make libsndfile seek there, and an exception in its callback would be
    printed.
    """

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()


class _SoundFile(soundfile.SoundFile):
    """A file that soundfile only reads forward.

    soundfile seeks after each read of a seekable file, which fails in a flac stream of unknown
    length.
    """

    def seekable(self) -> bool:
        return False


def _decode(
    file: io.BufferedIOBase | int, name: str, max_seconds: float, on_block: OnBlock | None
) -> Waveform:
    try:
        with _SoundFile(file, closefd=False) as opened:
            rate = opened.samplerate
            channels = opened.channels
            if rate * channels > MAX_VALUES:
                detail = f"{channels} channels at {rate} Hz are more than is decoded here"
                raise AudioError(name, "unreadable", detail)
            blocks = _read_blocks(opened)
            return _resample_and_check(blocks, rate, channels, name, max_seconds, on_block)
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        reason = getattr(error, "error_string", str(error)).rstrip(". ")
        raise AudioError(name, "unreadable", f"libsndfile cannot decode it ({reason})") from error


def _read_blocks(file: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """Yield channel 0 in blocks (samples,)."""
    frames = max(1, BLOCK // file.channels)
    # Seek to the start, as soundfile.read does: some files with a damaged header seem empty
    # otherwise. The overridden `seekable` would say no.
    if soundfile.SoundFile.seekable(file):
        file.seek(0)
    while True:
        block = file.read(frames, dtype="float32", always_2d=True)  # (samples, channels)
        yield np.ascontiguousarray(block[:, 0])
        if len(block) < frames:
            return


def _resample_and_check(
    blocks: Iterable[np.ndarray],
    rate: int,
    channels: int,
    name: str,
    max_seconds: float,
    on_block: OnBlock | None,
) -> Waveform:
    """Join blocks (samples,) of the first channel at 16 kHz; raises as `decode_audio`."""
    if not (isinstance(rate, Real) and MIN_RATE <= rate <= MAX_RATE and rate == int(rate)):
        raise AudioError(name, "unreadable", f"an impossible sampling rate, {rate} Hz")
    rate = int(rate)
    samples = 0
    low = math.inf
    high = -math.inf

    def checked_blocks() -> Iterator[np.ndarray]:
        nonlocal samples, low, high
        for block in blocks:
            if on_block is not None:
                on_block()
            samples += len(block)
            if samples > max_seconds * rate:
                raise AudioError(name, "too_long", f"more than {max_seconds:g} s of sound")
            if len(block):
                block_low = float(block.min())  # nan if the block contains one
                block_high = float(block.max())
                if not -math.inf < block_low <= block_high < math.inf:
                    raise AudioError(name, "unreadable", "contains values that are not finite")
                low = min(low, block_low)
                high = max(high, block_high)
            yield block

    empty = np.zeros(0, np.float32)
    waveform = np.concatenate([empty, *_resample(checked_blocks(), rate)])  # (samples at 16 kHz,)
    # Round up, as the resampler does, so that no clip passes here and is too short afterwards.
    resampled_length = -(-samples * SAMPLING_RATE // rate)
    if resampled_length < MIN_SAMPLES:
        raise AudioError(name, "too_short", f"{1000 * samples / rate:.1f} ms of sound")
    peak = max(-low, high)
    if peak > LOUDEST:
        detail = f"contains values up to {peak:.3g}, where audio samples are within 1"
        raise AudioError(name, "unreadable", detail)
    if high - low < QUIETEST:
        detail = f"every sample of its first channel is {low:g}, or less than a 24-bit step above"
        raise AudioError(name, "silent", detail)
    if peak > LOUD:
        _loudness_warning.give(name, peak)
    return Waveform(waveform, rate, channels)


def _resample(blocks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Resample blocks (samples,) of any length to 16 kHz; joined, they are the resampled clip."""
    if rate == SAMPLING_RATE:
        yield from blocks
        return
    # Each `down` samples become `up` samples.
    common = math.gcd(rate, SAMPLING_RATE)
    down = rate // common
    up = SAMPLING_RATE // common
    # How far torchaudio's kernel reaches to either side, in samples; then in whole periods.
    width = math.ceil(LOWPASS_FILTER_WIDTH * down / (ROLLOFF * min(down, up)))
    context = -(-width // down) * down
    is_large = up * (2 * width + down) > MAX_KERNEL

    def resample_part(waveform: np.ndarray, num_context: int) -> np.ndarray:
        """Resample samples of which the first `num_context` are context only."""
        if is_large:
            result = _resample_by_phase(torch.from_numpy(waveform), down, up, width)
        else:
            result = torchaudio.functional.resample(torch.from_numpy(waveform), rate, SAMPLING_RATE)
        return result[num_context // down * up :].numpy()

    waiting = np.zeros(0, np.float32)  # Samples that are not resampled yet, behind their context.
    num_context = 0
    for block in blocks:
        waiting = np.concatenate([waiting, block])
        ready = (len(waiting) - context) // down * down
        if len(waiting) >= BLOCK and ready > num_context:
            resampled = resample_part(waiting[: ready + context], num_context)
            yield resampled[: (ready - num_context) // down * up]
            waiting = waiting[max(0, ready - context) :]
            num_context = min(ready, context)
    if len(waiting) > num_context:
        yield resample_part(waiting, num_context)


def _resample_by_phase(waveform: torch.Tensor, down: int, up: int, width: int) -> torch.Tensor:
    """Resample as `torchaudio.functional.resample`, without the kernel weights that are zero.

    Each of `up` phases has a few weights, where torchaudio's kernel has `up * down`.
    """
    base = min(down, up) * ROLLOFF
    phases = torch.arange(up)
    nearest = phases * down // up  # (up,) sample at or before each output
    reach = torch.arange(-width, width + 2)  # (taps,)
    # In float32 and in the order of torchaudio's operations: rounded otherwise, the results differ
    # in the fifth digit.
    time = -phases[:, None] / up + (nearest[:, None] + reach) / down  # (up, taps)
    time = (time * base).clamp(-LOWPASS_FILTER_WIDTH, LOWPASS_FILTER_WIDTH)
    window = torch.cos(time * math.pi / LOWPASS_FILTER_WIDTH / 2) ** 2
    kernel = torch.sinc(time) * window * (base / down)  # (up, taps)
    padded = torch.nn.functional.pad(waveform, (width, width + 2 + down))
    windows = padded.unfold(0, len(reach), 1)  # (positions, taps)
    pieces = [(windows[start + nearest] * kernel).sum(1) for start in range(0, len(waveform), down)]
    return torch.cat(pieces)[: -(-len(waveform) * up // down)]


def _first_channel(array: np.ndarray, name: str) -> np.ndarray:
    """Return channel 0 of an array as float32 (samples,)."""
    if array.ndim not in (1, 2) or array.shape[0] == 0:
        raise AudioError(name, "unreadable", "an array must be (samples,) or (channels, samples)")
    if array.ndim == 2 and array.shape[0] > array.shape[1]:
        detail = "more channels than samples; an array must be (channels, samples), transpose it"
        raise AudioError(name, "unreadable", detail)
    waveform = array if array.ndim == 1 else array[0]  # (samples,)
    if waveform.dtype.kind == "i":
        return waveform.astype(np.float32) / (np.iinfo(waveform.dtype).max + 1.0)
    if waveform.dtype.kind != "f":
        detail = f"an array of {waveform.dtype}; use float or signed integers"
        raise AudioError(name, "unreadable", detail)
    # A value too large for float32 becomes infinite and is refused later.
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(waveform, dtype=np.float32)
