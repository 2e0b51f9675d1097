"""Reads from the header of an audio file how many bytes of audio it promises.

libsndfile takes the length of a wav, aiff, w64 or au from the size of the file if the file is
shorter than its header says. So a file that was cut, as by a download that broke off, looks whole.

A program that writes into a pipe cannot know the length, and writes the largest size or one close
to it. Such a header promises nothing.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

# Takes a position and a number of bytes, and returns that many bytes of the file, or fewer at its
# end.
ReadAt = Callable[[int, int], bytes]

MAX_CHUNKS = 1000  # Chunks that are read before the audio.
# Distance to the largest signed size from which a size means "unknown": sox writes 0x7ffff000,
# ffmpeg 0xffffffff, arecord 0x80000000.
UNKNOWN_BELOW_LARGEST = 4096
# Size in an RF64 file that refers to its ds64 chunk.
IN_DS64 = 2**32 - 1
XING_TAGS = (b"Xing", b"Info")
MAX_XING_POSITION = 256  # Bytes from the start of the first mp3 frame: 4 + 2 + 32 are usual.
ID3_HEADER = 10  # bytes


@dataclass(frozen=True)
class DataSize:
    """Bytes of audio in a file.

    Attributes:
        promised: what the header says.
        available: bytes between the start of the audio and the end of the file.
    """

    promised: int
    available: int


@dataclass(frozen=True)
class ChunkLayout:
    """The layout of a file that consists of chunks: an id, a size and that many bytes.

    Attributes:
        start: position of the first chunk.
        id_bytes: bytes of an id.
        size_format: format of a size, as `struct` has it.
        data_id: start of the id of the chunk with the audio.
        data_offset: bytes between the size of that chunk and the audio, which count as its bytes.
        alignment: chunks begin at a multiple of it.
        counts_header: whether a size includes id and size.
    """

    start: int
    id_bytes: int
    size_format: str
    data_id: bytes
    data_offset: int = 0
    alignment: int = 2
    counts_header: bool = False


RIFF = ChunkLayout(12, 4, "<I", b"data")
LAYOUTS = {
    b"RIFF": RIFF,
    b"RF64": RIFF,
    b"RIFX": ChunkLayout(12, 4, ">I", b"data"),
    b"FORM": ChunkLayout(12, 4, ">I", b"SSND", data_offset=8),
    b"riff": ChunkLayout(40, 16, "<Q", b"data", alignment=8, counts_header=True),  # w64
}


def read_data_size(read_at: ReadAt, file_size: int) -> DataSize | None:
    """Return the bytes of audio that a wav, RF64, aiff, w64 or au promises and has.

    Args:
        read_at: reads the file.
        file_size: in bytes.

    Returns:
        None for another format, and if the header leaves the size open.
    """
    magic = read_at(0, 4)
    if magic == b".snd":
        return _read_au(read_at, file_size)
    if magic not in LAYOUTS:
        return None
    layout = LAYOUTS[magic]
    header_bytes = layout.id_bytes + struct.calcsize(layout.size_format)
    position = layout.start
    size_in_ds64 = None
    for _ in range(MAX_CHUNKS):
        header = read_at(position, header_bytes)
        if len(header) < header_bytes:
            return None
        chunk_id = header[: layout.id_bytes]
        (size,) = struct.unpack(layout.size_format, header[layout.id_bytes :])
        if layout.counts_header:
            size = max(0, size - header_bytes)
        position += header_bytes
        if chunk_id == b"ds64":
            # The sizes of the file and of its audio, which may be larger than 32 bits.
            size_in_ds64 = int.from_bytes(read_at(position + 8, 8), "little")
        if chunk_id.startswith(layout.data_id):
            if size == IN_DS64 and size_in_ds64 is not None:
                size = size_in_ds64
            elif _is_unknown(size, layout.size_format):
                return None
            promised = max(0, size - layout.data_offset)
            return DataSize(promised, max(0, file_size - position - layout.data_offset))
        position += size
        position += -position % layout.alignment
        if position > file_size:
            return None
    return None


def _read_au(read_at: ReadAt, file_size: int) -> DataSize | None:
    header = read_at(4, 8)
    if len(header) < 8:
        return None
    start, size = struct.unpack(">II", header)
    if _is_unknown(size, ">I"):
        return None
    return DataSize(size, max(0, file_size - start))


def _is_unknown(size: int, size_format: str) -> bool:
    largest_signed = 2 ** (8 * struct.calcsize(size_format) - 1)
    return size >= largest_signed - UNKNOWN_BELOW_LARGEST


def has_mp3_length(read_at: ReadAt) -> bool:
    """Return whether an mp3 has the Xing or Info tag, in which the encoder wrote the length.

    Without the tag the length of an mp3 is estimated.
    """
    header = read_at(0, ID3_HEADER)
    position = 0
    if len(header) == ID3_HEADER and header[:3] == b"ID3":
        # The size of the ID3 tag has seven bits in each byte.
        for byte in header[6:]:
            position = position << 7 | byte & 0x7F
        position += ID3_HEADER
    frame = read_at(position, MAX_XING_POSITION)
    return any(tag in frame for tag in XING_TAGS)
