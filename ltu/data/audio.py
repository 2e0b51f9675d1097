"""Loads a clip (a path, bytes or an array) as a mono waveform at 16 kHz, or says why it cannot.

A path may also be the name of a clip in a table, TABLE_FILE#COLUMN[ROW] (`ltu.data.table_clip`).

A clip of several channels becomes mono by a rule, `Downmix`. The first channel is used by default,
as in the demo of the original LTU. LTU-AS uses the mean of all channels: the original decodes with
ffmpeg, whose mono is the mean of both channels of a stereo clip. (For more channels ffmpeg has
weights that depend on the positions of the loudspeakers; here it is their mean.)

The result is resampled to 16 kHz with `torchaudio.functional.resample`, as in the demo of the
original. libsndfile decodes (wav, flac, ogg, mp3 and more), so no ffmpeg program is needed.

A clip is decoded and resampled in blocks: only its 16 kHz waveform is ever in memory as a whole.
The length that a header claims is not trusted. A file that ends before that length is used as it
is, with a warning.

A clip that cannot be decoded raises `AudioError`, which has the source, a reason and a hint. No
waveform is ever made up for it.

Float samples in the range of integers are used as they are, with a warning: the models were trained
on samples within 1, but nothing proves that such a clip is wrong.

Warnings are in the `Waveform`. The first of each kind in a process is logged.
"""

import io
import logging
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import torch
import torchaudio.functional

from ltu.data.audio_header import DataSize, has_mp3_length, read_data_size
from ltu.data.table_clip import TableClip, TableClipError, find_content

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
# Frames of a file from which on its header does not say how many there are: libsndfile reports the
# largest number.
UNKNOWN_FRAMES = 2**62
# A file that lacks no more than this, in seconds, of the length in its header counts as whole: mp3
# decoders differ by a frame, which has up to 72 ms.
MAX_MISSING_SECONDS = 0.1
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
    "unreachable": "Check the address, or download the file and give its path.",
    "unreadable": "Convert it to wav, flac, ogg or mp3, or leave it out.",
    "too_short": "Use a clip of at least 25 ms, or leave it out.",
    "too_long": "Cut it into parts.",
    "damaged": "Remove its feature file and extract the features again.",
    "silent": "Use a clip with a signal, or leave it out.",
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


class FirstWarnings:
    """Logs the first warning of each kind in this process."""

    def __init__(self):
        self.kinds_given: set[str] = set()

    def give(self, kind: str, name: str, text: str) -> None:
        """Log a warning unless one of its kind was logged before.

        Args:
            kind: of the warning.
            name: path, or description of the bytes or array.
            text: a sentence that lacks its subject, the clip.
        """
        if kind in self.kinds_given:
            return
        self.kinds_given.add(kind)
        shown = UNPRINTABLE.sub(_escape, name)
        logger.warning("%s %s Further clips of this kind are not reported.", shown, text)


_first_warnings = FirstWarnings()

# How several channels become one: the first of them, or the mean of all.
Downmix = Literal["first", "mean"]


@dataclass
class Waveform:
    """A decoded clip.

    Attributes:
        waveform: (samples,), float32, mono, 16 kHz.
        sampling_rate: rate of the source in Hz, before resampling.
        channels: number of channels of the source.
        downmix: how they became one.
        expected_seconds: length that the header of the file promises; None if there is no header,
            or if it does not say.
        warnings: sentences about the clip for those who use it.
    """

    waveform: np.ndarray
    sampling_rate: int
    channels: int
    downmix: Downmix = "first"
    expected_seconds: float | None = None
    warnings: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return len(self.waveform) / SAMPLING_RATE

    @property
    def is_cut_short(self) -> bool:
        """Whether the file ends before the length that its header promises."""
        return _is_cut_short(self.seconds, self.expected_seconds)


def _is_cut_short(seconds: float, expected_seconds: float | None) -> bool:
    return expected_seconds is not None and expected_seconds - seconds > MAX_MISSING_SECONDS


def describe_cut(seconds: float, expected_seconds: float | None) -> str | None:
    """Return both lengths of a clip that is cut short, as a sentence without the clip, or None.

    Args:
        seconds: the length of the clip.
        expected_seconds: the length that its header promises; None if it does not say.
    """
    if not _is_cut_short(seconds, expected_seconds):
        return None
    return (
        f"is cut short: its header promises {expected_seconds:.2f} s of sound, the file has "
        f"{seconds:.2f} s. What it has is used."
    )


def read_expected_seconds(source: str | Path | bytes, seconds: float) -> float | None:
    """Return the length that the header of a wav, aiff, w64 or au promises; else None.

    Args:
        source: the file, or its bytes.
        seconds: its length, as libsndfile reports it: never more than the file has.
    """
    if isinstance(source, bytes):
        return _scale_length(_read_data_size(_Bytes(source)), seconds)
    with open(source, "rb") as stream:
        return _scale_length(_read_data_size(stream.fileno()), seconds)


def _scale_length(size: DataSize | None, seconds: float) -> float | None:
    """Return the length that a header promises, by the length of the audio that there is."""
    if size is None or not size.promised or not size.available:
        return None
    # Bytes after the audio are no audio; only what is missing counts.
    return seconds * max(1.0, size.promised / size.available)


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
        is_cut_short: whether the file ends before the length that its header promises.
        warnings: those of `Waveform`.
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
    is_cut_short: bool = False
    warnings: tuple[str, ...] = ()
    num_chunks: int = 1
    embeds: torch.Tensor | None = None


def load_audio(
    source: str | Path | bytes | np.ndarray | tuple[np.ndarray, int], downmix: Downmix = "first"
) -> np.ndarray:
    """Return the waveform of `decode_audio`: float32 (samples,), mono, 16 kHz."""
    return decode_audio(source, downmix=downmix).waveform


def decode_audio(
    source: str | Path | bytes | np.ndarray | tuple[np.ndarray, int] | Waveform,
    max_seconds: float = MAX_SECONDS,
    on_block: OnBlock | None = None,
    downmix: Downmix = "first",
) -> Waveform:
    """Load a clip as a mono waveform at 16 kHz.

    Args:
        source: a file, a clip in a table, the bytes of a file, or an array: (samples,) or
            (channels, samples), at 16 kHz unless it is given as `(array, rate in Hz)`. Integer
            arrays are scaled by the range of their type, as the same samples in a file would be. A
            `Waveform` is returned unchanged.
        max_seconds: a clip that turns out to be longer while it is decoded is refused.
        on_block: called after each block of up to `BLOCK` values is decoded; what it raises ends
            decoding.
        downmix: how several channels become one, "first" or "mean".

    Returns:
        a waveform of float32, in [-1, 1] if the source was.

    Raises:
        AudioError: the clip is missing, unreadable (also: nan, infinity, an impossible rate),
            shorter than 25 ms, longer than `max_seconds`, or silent (constant up to less than one
            step of 24-bit audio).
        TypeError: the source has another type.
        ValueError: the source is a `Waveform` of several channels that was made by another rule.
    """
    limits = _Limits(max_seconds, on_block)
    if isinstance(source, Waveform):
        if source.channels > 1 and source.downmix != downmix:
            raise ValueError(
                f"The waveform is the {source.downmix} of {source.channels} channels, the model "
                f"takes the {downmix}. Decode the clip with downmix={downmix!r}."
            )
        return source
    if isinstance(source, str | Path):
        if TableClip.parse(source) is not None:
            return _decode_table_clip(str(source), downmix, limits)
        return _decode_file(str(source), downmix, limits)
    if isinstance(source, bytes):
        return _decode(_Bytes(source), f"<{len(source)} bytes>", downmix, limits)
    return _decode_array(source, downmix, limits)


@dataclass(frozen=True)
class _Limits:
    """Limits of decoding, as in `decode_audio`."""

    max_seconds: float
    on_block: OnBlock | None


@dataclass(frozen=True)
class _Source:
    """What is known about a clip before it is decoded.

    Attributes:
        name: path, or description of the bytes or array.
        rate, channels: of the clip.
        downmix: how the channels become one.
        data_size: bytes of audio in the file, if its header has them.
        num_frames: samples of each channel that the header promises, if it does.
    """

    name: str
    rate: int
    channels: int
    downmix: Downmix
    data_size: DataSize | None = None
    num_frames: int | None = None

    def expected_seconds(self, seconds: float) -> float | None:
        """Return the length that the header promises, or None.

        Args:
            seconds: the length that was decoded.
        """
        if self.num_frames is not None:
            return self.num_frames / self.rate
        return _scale_length(self.data_size, seconds)

    def describe_length(self, num_samples: int) -> str:
        """Return the length of a clip that is too short, and what its header says about it."""
        text = f"{1000 * num_samples / self.rate:.1f} ms of sound"
        size = self.data_size
        if size is None:
            return text
        if size.promised == 0:
            return f"{text}: its header gives a data size of 0, and {size.available:,} bytes follow"
        if size.available < size.promised:
            return (
                f"{text}: its header gives a data size of {size.promised:,}, but "
                f"{size.available:,} bytes follow"
            )
        return text


def _decode_array(
    source: np.ndarray | tuple[np.ndarray, int], downmix: Downmix, limits: _Limits
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
    _check_array(array, name)
    channels = np.atleast_2d(array)  # (channels, samples)
    starts = range(0, channels.shape[1], BLOCK)
    blocks = (_to_mono(_to_float(channels[:, at : at + BLOCK]), downmix) for at in starts)
    source = _Source(name, rate, len(channels), downmix)
    return _resample_and_check(blocks, source, limits)


def _decode_table_clip(name: str, downmix: Downmix, limits: _Limits) -> Waveform:
    """Decode a clip in a table, or the file that the table has the path of."""
    try:
        content = find_content(name)
    except TableClipError as error:
        raise AudioError(name, error.reason, str(error)) from error
    if isinstance(content, bytes):
        return _decode(_Bytes(content), name, downmix, limits)
    try:
        return _decode_file(str(content), downmix, limits)
    except AudioError as error:
        raise AudioError(name, error.reason, f"{error.detail} ({content})") from error


def _decode_file(path: str, downmix: Downmix, limits: _Limits) -> Waveform:
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
            return _decode(stream.fileno(), path, downmix, limits)
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


def _decode(file: _Bytes | int, name: str, downmix: Downmix, limits: _Limits) -> Waveform:
    try:
        with _SoundFile(file, closefd=False) as opened:
            rate = opened.samplerate
            channels = opened.channels
            if rate * channels > MAX_VALUES:
                detail = f"{channels} channels at {rate} Hz are more than is decoded here"
                raise AudioError(name, "unreadable", detail)
            source = _read_promise(file, opened, _Source(name, rate, channels, downmix))
            return _resample_and_check(_read_blocks(opened, downmix), source, limits)
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        reason = getattr(error, "error_string", str(error)).rstrip(". ")
        raise AudioError(name, "unreadable", f"libsndfile cannot decode it ({reason})") from error


def _read_promise(file: _Bytes | int, opened: soundfile.SoundFile, source: _Source) -> _Source:
    """Return what is known about a clip, with the length that its header promises."""
    read_at = partial(_read_at, file)
    is_exact = opened.format == "FLAC" or opened.format == "MP3" and has_mp3_length(read_at)
    if is_exact and opened.frames < UNKNOWN_FRAMES:
        return replace(source, num_frames=opened.frames)
    return replace(source, data_size=_read_data_size(file))


def _read_data_size(file: _Bytes | int) -> DataSize | None:
    size = os.fstat(file).st_size if isinstance(file, int) else len(file.getbuffer())
    return read_data_size(partial(_read_at, file), size)


def _read_at(file: _Bytes | int, position: int, num_bytes: int) -> bytes:
    """Return bytes of a file without moving its position."""
    if isinstance(file, int):
        return os.pread(file, num_bytes, position)
    with file.getbuffer() as content:
        return bytes(content[position : position + num_bytes])


def _read_blocks(file: soundfile.SoundFile, downmix: Downmix) -> Iterator[np.ndarray]:
    """Yield mono blocks (samples,)."""
    frames = max(1, BLOCK // file.channels)
    # Seek to the start, as soundfile.read does: some files with a damaged header seem empty
    # otherwise. The overridden `seekable` would say no.
    if soundfile.SoundFile.seekable(file):
        file.seek(0)
    # libsndfile fails at bytes behind the audio of a flac, such as an ID3 tag, if it is asked for
    # more than the length in the header.
    num_left = file.frames if file.format == "FLAC" else UNKNOWN_FRAMES
    while True:
        num_wanted = min(frames, num_left)
        block = file.read(num_wanted, dtype="float32", always_2d=True)  # (samples, channels)
        yield _to_mono(block.T, downmix)
        num_left -= len(block)
        if len(block) < num_wanted or num_left == 0:
            return


def _to_mono(array: np.ndarray, downmix: Downmix) -> np.ndarray:
    """Return one channel (samples,) of float32 channels (channels, samples)."""
    if downmix == "first" or len(array) == 1:
        return np.ascontiguousarray(array[0])
    # A sum that is too large for float32 becomes infinite and is refused later.
    with np.errstate(over="ignore", invalid="ignore"):
        return array.mean(axis=0)


def _resample_and_check(blocks: Iterable[np.ndarray], source: _Source, limits: _Limits) -> Waveform:
    """Join mono blocks (samples,) at 16 kHz; raises as `decode_audio`."""
    name = source.name
    rate = source.rate
    if not (isinstance(rate, Real) and MIN_RATE <= rate <= MAX_RATE and rate == int(rate)):
        raise AudioError(name, "unreadable", f"an impossible sampling rate, {rate} Hz")
    rate = int(rate)
    samples = 0
    low = math.inf
    high = -math.inf

    def checked_blocks() -> Iterator[np.ndarray]:
        nonlocal samples, low, high
        for block in blocks:
            if limits.on_block is not None:
                limits.on_block()
            samples += len(block)
            if samples > limits.max_seconds * rate:
                raise AudioError(name, "too_long", f"more than {limits.max_seconds:g} s of sound")
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
        raise AudioError(name, "too_short", source.describe_length(samples))
    peak = max(-low, high)
    if peak > LOUDEST:
        detail = f"contains values up to {peak:.3g}, where audio samples are within 1"
        raise AudioError(name, "unreadable", detail)
    if high - low < QUIETEST:
        channel = "the mean of its channels" if source.downmix == "mean" else "its first channel"
        detail = f"every sample of {channel} is {low:g}, or less than a 24-bit step above"
        raise AudioError(name, "silent", detail)

    seconds = samples / rate
    expected_seconds = source.expected_seconds(seconds)
    texts = {}
    cut = describe_cut(seconds, expected_seconds)
    if cut is not None:
        texts["cut short"] = cut
    if peak > LOUD:
        texts["loud"] = describe_loudness(peak)
    for kind, text in texts.items():
        _first_warnings.give(kind, name, text)
    warnings = tuple(f"The clip {text}" for text in texts.values())
    return Waveform(waveform, rate, source.channels, source.downmix, expected_seconds, warnings)


def describe_loudness(peak: float) -> str:
    """Return what is wrong with a clip whose float samples reach `peak`, above `LOUD`."""
    full_scale = next(scale for scale in FULL_SCALES if peak <= scale)
    return (
        f"has float samples up to {peak:.6g}, where the models expect values within 1. They are "
        f"used as they are. If they are {full_scale.bit_length()}-bit integers stored as floats, "
        f"divide them by {full_scale}."
    )


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


def _check_array(array: np.ndarray, name: str) -> None:
    if array.ndim not in (1, 2) or array.shape[0] == 0:
        raise AudioError(name, "unreadable", "an array must be (samples,) or (channels, samples)")
    if array.ndim == 2 and array.shape[0] > array.shape[1]:
        detail = "more channels than samples; an array must be (channels, samples), transpose it"
        raise AudioError(name, "unreadable", detail)
    if array.dtype.kind not in "if":
        detail = f"an array of {array.dtype}; use float or signed integers"
        raise AudioError(name, "unreadable", detail)


def _to_float(array: np.ndarray) -> np.ndarray:
    """Return an array as float32; integers are scaled by the range of their type."""
    if array.dtype.kind == "i":
        return array.astype(np.float32) / (np.iinfo(array.dtype).max + 1.0)
    # A value too large for float32 becomes infinite and is refused later.
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)
