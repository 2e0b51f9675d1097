"""Path, bytes or array to a mono 16 kHz waveform, or an error that says what is wrong with it.

Notable:
- channel 0 is used and the rate becomes 16 kHz with `torchaudio.functional.resample`, as in the original's demo;
- libsndfile decodes (wav, flac, ogg, mp3 and more), so no ffmpeg program is needed;
- a clip is decoded and resampled in blocks, so only its 16 kHz waveform is ever whole in memory, and what its header
  claims is not believed;
- nothing is ever made up for a clip that cannot be heard: `AudioError` has the source, a reason and the way out.
"""

import io
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio.functional

SAMPLING_RATE = 16_000  # Hz
MIN_SAMPLES = 400  # 25 ms at 16 kHz: one window of the filterbank
MAX_SECONDS = 3600.0
MIN_RATE, MAX_RATE = 1_000, 1_000_000  # Hz; sound is recorded at 8,000 to 768,000.
MAX_VALUES = (
    2**22
)  # a second, of all channels: eight at 192 kHz are 1.5 million; a small file can claim far more
LOUDEST = 2.0**31  # Full scale of 32 bit; the filterbank overflows far above it.
QUIETEST = (
    2.0**-23
)  # One step of 24 bit: the filterbanks of both models are at their floor below it.
BLOCK = 2**22  # values that are decoded, and samples that are resampled, at once: 16 MiB of float32
MAX_KERNEL = (
    2**20
)  # weights of torchaudio's kernel; 44,100 Hz needs 76,000, but 44,101 Hz 706 million.

HINTS = {
    "missing": "Check the path; relative paths are looked up from the data file or from --audio_root.",
    "unreadable": "Convert it to wav, flac, ogg or mp3, or leave it out.",
    "too_short": "Use a clip of at least 25 ms, or leave it out.",
    "too_long": "Cut it into parts.",
    "damaged": "Remove its file of features and extract them again.",
    "silent": "Use a clip with sound in its first channel, or leave it out.",
}
# What would break a line or cannot be written as UTF-8: file names may hold both.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class AudioError(ValueError):
    """A clip that cannot be heard. The message is one line that can be written as UTF-8, whatever the name.

    Attributes:
        source: the path, or a description of the bytes or array.
        reason: a key of `HINTS`.
    """

    def __init__(self, source: str, reason: str, detail: str):
        self.source = source
        self.reason = reason
        self.detail = detail
        shown = source if len(source) <= 500 else f"{source[:240]}...{source[-240:]}"
        text = f"{shown}: {detail}. {HINTS[reason]}"
        super().__init__(
            UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
        )

    def __reduce__(self):
        # Workers of a data loader pickle their errors; the default would call __init__ with the message alone.
        return type(self), (self.source, self.reason, self.detail)


@dataclass
class Waveform:
    """A clip as it is heard, `waveform` (samples,) mono at 16 kHz, and what was found: its rate in Hz, its channels."""

    waveform: np.ndarray
    sampling_rate: int
    channels: int


AudioSource = str | Path | bytes | np.ndarray | tuple[np.ndarray, int] | Waveform | None


@dataclass
class AudioClip:
    """A clip before the ear: its waveform (samples,) at 16 kHz, or what a feature folder holds of it; and after it.

    `sampling_rate` and `channels` are those that were found; `num_chunks` is how many are to be used; `embeds`
    (num_chunks, num_audio_tokens, hidden) is what the ear and the projection made of them, once they did.
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
    """The waveform of `decode_audio`: float32 `(samples,)`, mono, 16 kHz."""
    return decode_audio(source).waveform


def decode_audio(
    source: str | Path | bytes | np.ndarray | tuple[np.ndarray, int] | Waveform,
    max_seconds: float = MAX_SECONDS,
) -> Waveform:
    """Load a clip as mono 16 kHz.

    Args:
        source: a file, the bytes of one, or an array: `(samples,)` or `(channels, samples)`, at 16 kHz unless it comes
            as `(array, rate in Hz)`. Integer arrays are scaled by the range of their type, as a file of them would be.
            What this function gave before is given back.
        max_seconds: a clip that turns out longer while it is decoded is refused.

    Returns:
        its waveform is float32, the first channel, in [-1, 1] if the source was.

    Raises:
        AudioError: the clip is missing, unreadable (also: nan, infinity, an impossible rate), shorter than 25 ms,
            longer than `max_seconds`, or silent (constant but for less than a step of 24 bit).
        TypeError: the source is none of these.
    """
    if isinstance(source, Waveform):
        return source
    if isinstance(source, str | Path):
        return _read_file(str(source), max_seconds)
    if isinstance(source, bytes):
        return _decode(_Bytes(source), f"<{len(source)} bytes>", max_seconds)
    array, rate = (
        source if isinstance(source, tuple) and len(source) == 2 else (source, SAMPLING_RATE)
    )
    if not isinstance(array, np.ndarray):
        found = (
            [type(part).__name__ for part in source]
            if isinstance(source, tuple)
            else type(source).__name__
        )
        raise TypeError(
            f"A clip is a path, bytes, an array or (array, rate in Hz), not {found}. "
            "Convert other types to a numpy array first."
        )
    name = f"<array of shape {tuple(array.shape)} at {rate} Hz>"
    waveform = _first_channel(array, name)
    blocks = (waveform[start : start + BLOCK] for start in range(0, len(waveform), BLOCK))
    return _resample_blocks(blocks, rate, 1 if array.ndim == 1 else len(array), name, max_seconds)


def _read_file(path: str, max_seconds: float) -> Waveform:
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            raise AudioError(path, "missing", "is a folder, not a file")
        if not stat.S_ISREG(found.st_mode):  # Opening a pipe or a device could wait for ever.
            raise AudioError(path, "unreadable", "is a pipe, socket or device, not a file")
        if found.st_size == 0:
            raise AudioError(path, "unreadable", "is an empty file")
        with open(path, "rb") as stream:
            # By name, libsndfile would take macOS's `._` file beside it for a part of it, and refuse an mp3.
            return _decode(stream.fileno(), path, max_seconds)
    except FileNotFoundError as error:
        raise AudioError(path, "missing", "no such file") from error
    except PermissionError as error:
        raise AudioError(path, "unreadable", "may not be read: permission denied") from error
    except AudioError:
        raise
    except (
        OSError,
        ValueError,
    ) as error:  # Of its name: too long, a loop of links, characters that no name has.
        raise AudioError(
            path, "missing", f"no such file ({getattr(error, 'strerror', None) or error})"
        ) from error


class _Bytes(io.BytesIO):
    """A damaged file can make libsndfile seek to before its start; an exception in its callback would be printed."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()


class _SoundFile(soundfile.SoundFile):
    """soundfile seeks after each read, which fails in a flac stream of unknown length: not where nothing can seek."""

    def seekable(self) -> bool:
        return False


def _decode(file: io.BufferedIOBase | int, name: str, max_seconds: float) -> Waveform:
    try:
        with _SoundFile(file, closefd=False) as opened:
            if opened.samplerate * opened.channels > MAX_VALUES:
                detail = f"{opened.channels} channels at {opened.samplerate} Hz are more than is decoded here"
                raise AudioError(name, "unreadable", detail)
            return _resample_blocks(
                _blocks(opened), opened.samplerate, opened.channels, name, max_seconds
            )
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        reason = getattr(error, "error_string", str(error)).rstrip(". ")
        raise AudioError(name, "unreadable", f"libsndfile cannot decode it ({reason})") from error


def _blocks(file: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """Channel 0, (samples,) at a time."""
    frames = max(1, BLOCK // file.channels)
    if soundfile.SoundFile.seekable(file):
        file.seek(
            0
        )  # As soundfile.read does: without it some files with a damaged header seem empty.
    while True:
        block = file.read(frames, dtype="float32", always_2d=True)  # (samples, channels)
        yield np.ascontiguousarray(block[:, 0])
        if len(block) < frames:
            return


def _resample_blocks(
    blocks: Iterable[np.ndarray], rate: int, channels: int, name: str, max_seconds: float
) -> Waveform:
    """Blocks (samples,) of the first channel -> a sound, unless something is wrong with them."""
    if not (isinstance(rate, Real) and MIN_RATE <= rate <= MAX_RATE and rate == int(rate)):
        raise AudioError(name, "unreadable", f"an impossible sampling rate, {rate} Hz")
    rate, samples, low, high = int(rate), 0, math.inf, -math.inf

    def checked() -> Iterator[np.ndarray]:
        nonlocal samples, low, high
        for block in blocks:
            samples += len(block)
            if samples > max_seconds * rate:
                raise AudioError(name, "too_long", f"more than {max_seconds:g} s of sound")
            if len(block):
                lowest, highest = (
                    float(block.min()),
                    float(block.max()),
                )  # nan if one is in the block
                if not -math.inf < lowest <= highest < math.inf:
                    raise AudioError(name, "unreadable", "holds values that are not finite")
                low, high = min(low, lowest), max(high, highest)
            yield block

    waveform = np.concatenate(
        [np.zeros(0, np.float32), *_resample(checked(), rate)]
    )  # (samples at 16 kHz,)
    # Rounded up as the resampler does, so that no clip passes here and is too short afterwards.
    if -(-samples * SAMPLING_RATE // rate) < MIN_SAMPLES:
        raise AudioError(name, "too_short", f"{1000 * samples / rate:.1f} ms of sound")
    if max(-low, high) > LOUDEST:
        raise AudioError(
            name, "unreadable", f"holds values up to {max(-low, high):.3g}, where sound is within 1"
        )
    if high - low < QUIETEST:
        raise AudioError(
            name, "silent", f"every sample of its first channel is {low:g}, or as good as that"
        )
    return Waveform(waveform, rate, channels)


def _resample(blocks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Blocks (samples,) of any length -> blocks at 16 kHz: together what the whole would become."""
    if rate == SAMPLING_RATE:
        yield from blocks
        return
    common = math.gcd(rate, SAMPLING_RATE)
    down, up = rate // common, SAMPLING_RATE // common  # Each `down` samples become `up`.
    width = math.ceil(
        6 * down / (0.99 * min(down, up))
    )  # torchaudio's reach, in samples to either side
    context = -(-width // down) * down
    is_large = up * (2 * width + down) > MAX_KERNEL
    held, before = (
        np.zeros(0, np.float32),
        0,
    )  # Samples that wait; the first `before` are context only.

    def resampled(waveform: np.ndarray) -> np.ndarray:
        if is_large:
            found = _resample_by_phase(torch.from_numpy(waveform), down, up, width)
        else:
            found = torchaudio.functional.resample(torch.from_numpy(waveform), rate, SAMPLING_RATE)
        return found[before // down * up :].numpy()

    for block in blocks:
        held = np.concatenate([held, block])
        ready = (len(held) - context) // down * down
        if len(held) >= BLOCK and ready > before:
            yield resampled(held[: ready + context])[: (ready - before) // down * up]
            held, before = held[max(0, ready - context) :], min(ready, context)
    if len(held) > before:
        yield resampled(held)


def _resample_by_phase(waveform: torch.Tensor, down: int, up: int, width: int) -> torch.Tensor:
    """`torchaudio.functional.resample`, with only those weights of its kernel that are not zero: a few for each of `up`
    phases, where torchaudio's has `up * down`."""
    base = min(down, up) * 0.99
    phases = torch.arange(up)
    nearest = phases * down // up  # (up,) sample at or before each output
    reach = torch.arange(-width, width + 2)  # (taps,)
    # In float32, as torchaudio has it: rounded like this, or the two differ in the fifth digit.
    time = -phases[:, None] / up + (nearest[:, None] + reach) / down  # (up, taps)
    time = (time * base).clamp(-6, 6)
    kernel = torch.sinc(time) * torch.cos(time * math.pi / 12) ** 2 * (base / down)  # (up, taps)
    padded = torch.nn.functional.pad(waveform, (width, width + 2 + down))
    windows = padded.unfold(0, len(reach), 1)  # (positions, taps)
    pieces = [(windows[start + nearest] * kernel).sum(1) for start in range(0, len(waveform), down)]
    return torch.cat(pieces)[: -(-len(waveform) * up // down)]


def _first_channel(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim not in (1, 2) or array.shape[0] == 0:
        raise AudioError(name, "unreadable", "an array must be (samples,) or (channels, samples)")
    if array.ndim == 2 and array.shape[0] > array.shape[1]:
        detail = "more channels than samples; an array must be (channels, samples), transpose it"
        raise AudioError(name, "unreadable", detail)
    waveform = array if array.ndim == 1 else array[0]  # (samples,)
    if waveform.dtype.kind == "i":
        return waveform.astype(np.float32) / (np.iinfo(waveform.dtype).max + 1.0)
    if waveform.dtype.kind != "f":
        raise AudioError(
            name, "unreadable", f"an array of {waveform.dtype}; use float or signed integers"
        )
    with np.errstate(over="ignore"):  # What is too large becomes infinite, and is refused as that.
        return np.ascontiguousarray(waveform, dtype=np.float32)
