"""Caches the outputs of a frozen audio encoder on disk, so that each clip is encoded once.

An output is found by the sha256 of the file from which the features of a clip are computed: the
audio, or its stored features. Outputs of different encoders are in different folders: the name of a
folder is a hash of the weights and the config of the encoder, of the settings of its features, and
of the precision in which it computes. Outputs are stored in the dtype in which they were computed.

    DIR/clips-ID.safetensors            the hash of files, by path, size and time of change
    DIR/ENCODER/hidden-ID.safetensors   the outputs of up to some thousand clips

Each file is written whole or not at all, under a name of its own, so that several runs can fill one
folder. A file that is cut or damaged is not used, and an output whose checksum does not fit is not
used either: these clips are encoded again. A clip that cannot be decoded has no output.

The content of a clip is checked when a run starts, not at each use. A file that was replaced by
another one of the same size and time of change is not noticed.
"""

import hashlib
import json
import logging
import os
import shutil
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm import tqdm

from ltu.data.audio import AudioError
from ltu.data.table_clip import (
    TableClip,
    TableClipError,
    sha256_of_clip,
    version_of_clip,
)
from ltu.files import replace_file, sha256_of
from ltu.models.audio_front_end import AudioFrontEnd
from ltu.models.configuration_ltu import LtuConfig
from ltu.models.modeling_ltu import LtuForConditionalGeneration
from ltu.models.provenance import library_versions
from ltu.training.arguments import RunArguments
from ltu.training.dataset import QaDataset
from ltu.training.stop_signal import ignore_stop_signals

logger = logging.getLogger(__name__)

# Raise it when the features of a clip, or the output of an encoder, become others.
FORMAT = 1
DIGEST_BYTES = 32  # Of a sha256.
MAX_SHARD_BYTES = 2**28  # Of the outputs in one file. A process holds two of them while it writes.
# Keys of a config that say nothing about the output.
IGNORED_CONFIG_KEYS = ("_name_or_path", "architectures", "transformers_version")


def bytes_per_clip(config: LtuConfig) -> int:
    """Return the bytes of the output of one clip: fp32, also where autocast computes in bf16."""
    return config.num_audio_tokens * config.audio_config.hidden_size * torch.float32.itemsize


def describe_size(folder: str | Path, config: LtuConfig, num_clips: int) -> str:
    """Return the line of `--plan` about a cache."""
    size = bytes_per_clip(config)
    return (
        f"encoder cache: {folder}, up to {num_clips} clips of {size / 1000:.3g} kB = "
        f"{num_clips * size / 1e9:.3g} GB"
    )


def hash_encoder(
    model: LtuForConditionalGeneration, front_end: AudioFrontEnd, run: RunArguments
) -> str:
    """Return a hash of all that decides the output for a given content of a clip."""
    config = model.config.audio_config.to_dict()
    settings = {
        "format": FORMAT,
        "code": library_versions().get("ltu"),
        "config": {key: config[key] for key in config.keys() - set(IGNORED_CONFIG_KEYS)},
        "features": front_end.describe_features(),
        "bf16": run.bf16,
        # torch's older function fails after --tf32, which sets the precision by the newer one.
        "matmul_precision": torch.backends.cuda.matmul.fp32_precision,
        "conv_precision": torch.backends.cudnn.conv.fp32_precision,
        "device": run.device.type,
    }
    text = json.dumps(settings, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode("utf-8", "backslashreplace"))
    for name, tensor in sorted(model.audio_tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of the values of a tensor."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


class DigestTable:
    """Finds the positions of digests, in 48 bytes of memory for each.

    Args:
        digests: (n, 32) uint8.
    """

    def __init__(self, digests: np.ndarray):
        self.digests = digests
        prefixes = digests[:, :8].copy().view(np.uint64)[:, 0]  # (n,)
        self.order = np.argsort(prefixes, kind="stable")
        self.prefixes = prefixes[self.order]

    def find(self, digest: bytes) -> int | None:
        """Return the position of a digest, or None.

        Of digests with the same first eight bytes, only one is found.
        """
        prefix = np.frombuffer(digest[:8], np.uint64)[0]
        place = np.searchsorted(self.prefixes, prefix)
        if place == len(self.prefixes):
            return None
        position = int(self.order[place])
        return position if self.digests[position].tobytes() == digest else None


def _as_array(digests: Iterable[bytes]) -> np.ndarray:
    """Return digests as an array, (n, 32) uint8."""
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file of the cache, whole or not at all.

    Raises:
        OSError: it cannot be written, for example to a full disk.
    """
    content = save(tensors)
    try:
        replace_file(path, content, is_synced=True)
    except OSError as error:
        path.with_name(f"{path.name}.tmp").unlink(missing_ok=True)
        raise OSError(
            f"{path} of {len(content):,} bytes cannot be written ({error}). If the disk is full, "
            "free it, give another --encoder_cache, or leave the flag out. What the cache holds "
            "already is used by the next run."
        ) from error


class ClipVersions:
    """Knows the hash of files by their path, size and time of change.

    Args:
        folder: of `--encoder_cache`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        versions = [np.empty((0, DIGEST_BYTES), np.uint8)]
        keys = [np.empty((0, DIGEST_BYTES), np.uint8)]
        for path in sorted(folder.glob("clips-*.safetensors")):
            try:
                with safe_open(path, "np") as file:
                    found = file.get_tensor("version"), file.get_tensor("key")
                if found[0].shape != found[1].shape or found[0].shape[1:] != (DIGEST_BYTES,):
                    raise ValueError("its tensors have wrong shapes")
            except (SafetensorError, OSError, ValueError) as error:
                _warn_of_damage(path, error)
                continue
            versions.append(found[0])
            keys.append(found[1])
        self.table = DigestTable(np.concatenate(versions))
        self.keys = np.concatenate(keys)
        self.new: dict[bytes, bytes] = {}

    def find(self, version: bytes) -> bytes | None:
        """Return the hash of the content of a file, if it is known."""
        position = self.table.find(version)
        return None if position is None else self.keys[position].tobytes()

    def add(self, version: bytes, key: bytes) -> None:
        self.new[version] = key

    def write(self) -> None:
        """Write what was added."""
        if self.new:
            tensors = {
                "version": torch.from_numpy(_as_array(self.new).copy()),
                "key": torch.from_numpy(_as_array(self.new.values()).copy()),
            }
            _write(self.folder / f"clips-{uuid4().hex}.safetensors", tensors)


def version_of(path: str | Path) -> bytes | None:
    """Return a digest of the path, size and time of change of a file; None if it is no file.

    For a clip in a table it is that of `version_of_clip`.
    """
    if TableClip.parse(path) is not None:
        text = version_of_clip(path)
        return text and hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(status.st_mode):  # Reading a pipe or a device could block for ever.
        return None
    text = f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _warn_of_damage(path: Path, error: Exception) -> None:
    logger.warning(
        "%s is damaged (%s) and is not used; its clips are encoded again. Delete it.", path, error
    )


class EncoderOutputs:
    """The stored outputs of one encoder, by the hash of the content of a clip.

    Args:
        folder: of the encoder.
        shape: (tokens, width) of an output.
        names: files that are there for certain, which a network file system may not list yet.
    """

    def __init__(self, folder: Path, shape: tuple[int, int], names: Iterable[str] = ()):
        self.folder = folder
        self.shape = shape
        self.shards: list[Path] = []
        listed = {path.name for path in folder.glob("hidden-*.safetensors")}
        keys = [np.empty((0, DIGEST_BYTES), np.uint8)]
        for name in sorted(listed | set(names)):
            try:
                keys.append(self._read_keys(folder / name))
            except (SafetensorError, OSError, ValueError) as error:
                _warn_of_damage(folder / name, error)
                continue
            self.shards.append(folder / name)
        # The outputs of shard i are at the positions from starts[i] on.
        self.starts = np.cumsum([len(part) for part in keys])
        self.table = DigestTable(np.concatenate(keys))
        self._files: dict[int, safe_open] = {}
        self._damaged: set[int] = set()  # Shards of which a warning was given.

    def __len__(self) -> int:
        return len(self.table.digests)

    def __getstate__(self) -> dict:
        # A spawned worker opens the files again.
        return self.__dict__ | {"_files": {}}

    def _read_keys(self, path: Path) -> np.ndarray:
        """Return the keys of a shard, (n, 32) uint8.

        Raises:
            OSError, SafetensorError, ValueError: it is cut, damaged, or of other shapes.
        """
        with safe_open(path, "np") as file:
            keys = file.get_tensor("key")
            shapes = [file.get_slice(name).get_shape() for name in ("key", "checksum", "hidden")]
        expected = [[len(keys), DIGEST_BYTES], [len(keys)], [len(keys), *self.shape]]
        if shapes != expected:
            raise ValueError(f"its tensors have the shapes {shapes} instead of {expected}")
        return keys

    def read(self, position: int) -> Tensor | None:
        """Return the output at a position, (tokens, width), or None if it is damaged."""
        shard = int(np.searchsorted(self.starts, position, side="right")) - 1
        row = position - int(self.starts[shard])
        try:
            if shard not in self._files:
                self._files[shard] = safe_open(self.shards[shard], "pt")
            file = self._files[shard]
            hidden = file.get_slice("hidden")[row]  # (tokens, width)
            checksum = int(file.get_slice("checksum")[row])
            if checksum != _checksum(self.table.digests[position].tobytes(), hidden):
                raise ValueError("the checksum of an output does not fit")
        except (SafetensorError, OSError, ValueError) as error:
            if shard not in self._damaged:
                _warn_of_damage(self.shards[shard], error)
            self._damaged.add(shard)
            return None
        return hidden

    def write(self, outputs: dict[bytes, Tensor]) -> str:
        """Write outputs, each (tokens, width), by their keys; return the name of the file.

        Raises:
            OSError: it cannot be written, for example to a full disk.
        """
        checksums = [_checksum(key, hidden) for key, hidden in outputs.items()]
        path = self.folder / f"hidden-{uuid4().hex}.safetensors"
        tensors = {
            "key": torch.from_numpy(_as_array(outputs).copy()),
            "checksum": torch.tensor(checksums),
            "hidden": torch.stack(list(outputs.values())),
        }
        _write(path, tensors)
        return path.name


def _checksum(key: bytes, hidden: Tensor) -> int:
    return zlib.crc32(_bytes_of(hidden), zlib.crc32(key))


def _name_of(example: dict) -> bytes:
    """Return a digest of the path of a clip and of its name, by which its features are found."""
    text = f"{example['audio']}\0{example.get('audio_id')}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


class EncodedClips:
    """Reads the encoder outputs of the clips of a run.

    Args:
        outputs: of the encoder.
        keys: the hash of the content of each clip, by `_name_of` of its example.
    """

    def __init__(self, outputs: EncoderOutputs, keys: dict[bytes, bytes]):
        self.outputs = outputs
        names = []
        positions = []
        for name, key in keys.items():
            position = outputs.table.find(key)
            if position is not None:
                names.append(name)
                positions.append(position)
        self.table = DigestTable(_as_array(names))
        self.positions = np.array(positions, np.int64)

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, example: dict) -> Tensor | None:
        """Return the output for the clip of an example, (tokens, width), or None."""
        place = self.table.find(_name_of(example))
        return None if place is None else self.outputs.read(int(self.positions[place]))


@dataclass
class LoadedClip:
    """A clip that is to be encoded.

    Attributes:
        name: as `_name_of` returns it.
        version: as `version_of` returns it.
        key: hash of its content.
        features: input of the audio encoder; None if the output for this content is stored.
    """

    name: bytes
    version: bytes
    key: bytes
    features: Tensor | None


class ClipsToEncode(Dataset):
    """Loads clips; one that cannot be decoded is None.

    Args:
        examples: with these clips, and others.
        indices: one example of each clip to load.
        front_end: loads and hashes them.
        known: the keys of which outputs are stored.
    """

    def __init__(
        self, examples: Dataset, indices: list[int], front_end: AudioFrontEnd, known: DigestTable
    ):
        self.examples = examples
        self.indices = indices
        self.front_end = front_end
        self.known = known

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> LoadedClip | None:
        example = self.examples[self.indices[index]]
        features = None
        try:
            source = self.front_end.find_source(example)
            version = version_of(source)
            if version is None:
                return None
            is_in_table = TableClip.parse(source) is not None
            digest = sha256_of_clip(source) if is_in_table else sha256_of(source)
            key = bytes.fromhex(digest)
            if self.known.find(key) is None:
                features = self.front_end.load_features(example)
            # The features of a file that was replaced meanwhile would get the hash of another one.
            if version_of(source) != version:
                return None
        except (AudioError, OSError, TableClipError):
            return None
        return LoadedClip(_name_of(example), version, key, features)


@dataclass
class FilledCache:
    """What filling the cache has done.

    Attributes:
        clips: reads the outputs.
        folder: of the encoder.
        num_clips: distinct clips of the run.
        num_encoded: clips that all ranks have encoded.
    """

    clips: EncodedClips
    folder: Path
    num_clips: int
    num_encoded: int

    def describe(self) -> str:
        """Return the line that a run prints at its start."""
        text = (
            f"encoder cache: {self.folder} has {len(self.clips)} of the {self.num_clips} clips of "
            f"this run, {self.num_encoded} of them encoded now"
        )
        if len(self.clips) < self.num_clips:
            text += "; the others could not be decoded"
        return text


class PartOfRank:
    """What one rank adds to a cache.

    Args:
        outputs, versions: of the cache.

    Attributes:
        keys: the hashes of the contents of clips whose outputs are stored, by `_name_of`.
        files: the names of the files of outputs.
        num_encoded: the clips that were encoded.
    """

    def __init__(self, outputs: EncoderOutputs, versions: ClipVersions):
        self.outputs = outputs
        self.versions = versions
        self.keys: dict[bytes, bytes] = {}
        self.files: list[str] = []
        self.num_encoded = 0
        self._hidden: dict[bytes, Tensor] = {}  # Outputs that are not written yet, by their keys.
        self._clips: list[LoadedClip] = []  # Those of these outputs, and others of known content.
        self._encoded: set[bytes] = set()

    def find_new(self, clips: list[LoadedClip]) -> dict[bytes, Tensor]:
        """Return the features to encode, by their keys: each content once."""
        new = {}
        for clip in clips:
            if clip.features is not None and clip.key not in self._encoded:
                new[clip.key] = clip.features
        return new

    def add(self, clips: list[LoadedClip], hidden: dict[bytes, Tensor]) -> None:
        """Add clips, and the outputs (tokens, width) of those that are new."""
        for clip in clips:
            clip.features = None
        self._clips += clips
        self._hidden |= hidden
        self._encoded |= hidden.keys()
        self.num_encoded += len(hidden)

    @property
    def num_waiting(self) -> int:
        """The number of outputs that are not written."""
        return len(self._hidden)

    def write(self) -> None:
        """Write what was added.

        Raises:
            OSError: it cannot be written, for example to a full disk.
        """
        if self._hidden:
            self.files.append(self.outputs.write(self._hidden))
        # Only now, because a clip whose output was not written must be encoded again.
        for clip in self._clips:
            self.versions.add(clip.version, clip.key)
            self.keys[clip.name] = clip.key
        self._hidden = {}
        self._clips = []


class CacheFiller:
    """Encodes the clips of a run whose outputs are not stored; each rank encodes a part.

    Args:
        folder: of `--encoder_cache`.
        model: its audio encoder is frozen.
        front_end: loads the clips.
        run: the flags of the run.
        num_workers: processes that load clips.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(
        self,
        folder: str | Path,
        model: LtuForConditionalGeneration,
        front_end: AudioFrontEnd,
        run: RunArguments,
        num_workers: int,
    ):
        self.root = Path(folder)
        self.model = model
        self.front_end = front_end
        self.run = run
        self.num_workers = num_workers
        config = model.config
        self.shape = (config.num_audio_tokens, config.audio_config.hidden_size)
        self.bytes_per_clip = bytes_per_clip(config)
        self.folder = self.root / hash_encoder(model, front_end, run)[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"--encoder_cache {folder} is no folder, and cannot be made ({error.strerror})."
            ) from error

    def fill(self, datasets: list[QaDataset], indices: list[Iterable[int]]) -> FilledCache:
        """Encode what is missing, and return a reader of all outputs. Every rank must call this.

        Args:
            datasets: of the run.
            indices: of each, the examples that the run uses.

        Raises:
            OSError: the disk is full, or cannot be written.
            ValueError: the stored features of a clip are those of other audio.
        """
        examples = ConcatDataset([dataset.examples for dataset in datasets])
        starts = [0, *examples.cumulative_sizes[:-1]]
        clips: dict[bytes, int] = {}  # One example of each clip of the run.
        for start, used in zip(starts, indices, strict=True):
            for index in used:
                example = examples[start + index]
                if example["audio"] is not None:
                    clips.setdefault(_name_of(example), start + index)

        outputs = EncoderOutputs(self.folder, self.shape)
        versions = ClipVersions(self.root)
        part = PartOfRank(outputs, versions)
        missing = []
        # The clips and their order are the same on all ranks.
        for number, (name, index) in enumerate(clips.items()):
            if number % self.run.world_size != self.run.process_index:
                continue
            version = version_of(self.front_end.find_source(examples[index]))
            key = None if version is None else versions.find(version)
            if key is not None and outputs.table.find(key) is not None:
                part.keys[name] = key
            else:
                missing.append(index)
        self._check_space(len(missing) - len(outputs))
        if missing:
            self._encode(ClipsToEncode(examples, missing, self.front_end, outputs.table), part)
            versions.write()

        # All ranks have written their parts when the first one passes here.
        gathered = gather_object([(part.keys, part.files, part.num_encoded)])
        keys: dict[bytes, bytes] = {}
        files: list[str] = []
        num_encoded = 0
        for other_keys, other_files, number in gathered:
            keys |= other_keys
            files += other_files
            num_encoded += number
        reader = EncodedClips(EncoderOutputs(self.folder, self.shape, files), keys)
        return FilledCache(reader, self.folder, len(clips), num_encoded)

    def _check_space(self, num_clips: int) -> None:
        """Raise an OSError if the disk has no space for the outputs of so many clips a rank."""
        needed = num_clips * self.bytes_per_clip * self.run.world_size
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"--encoder_cache {self.root} needs {needed / 1e9:.3g} GB, but its disk has "
                f"{free / 1e9:.3g} GB free. Free it, give another folder, or leave the flag out."
            )

    def _encode(self, clips: ClipsToEncode, part: PartOfRank) -> None:
        """Encode clips and write their outputs.

        Raises:
            OSError: they cannot be written, for example to a full disk.
        """
        # As many clips at once as without a cache, because rounding can depend on it.
        batch_size = self.run.micro_batch_size
        num_batches = -(-len(clips) // batch_size)
        loader = DataLoader(
            clips,
            batch_size=batch_size,
            collate_fn=list,
            num_workers=min(self.num_workers, num_batches),
            worker_init_fn=ignore_stop_signals,
        )
        clips_per_shard = max(1, MAX_SHARD_BYTES // self.bytes_per_clip)
        is_quiet = self.run.disable_tqdm or self.run.process_index != 0
        with (
            self._tower_on_device(),
            tqdm(total=len(clips), desc="encoding", unit="clip", disable=is_quiet) as bar,
        ):
            for batch in loader:
                loaded = [clip for clip in batch if clip is not None]
                new = part.find_new(loaded)
                hidden = {}
                if new:
                    hidden = dict(zip(new, self._run_encoder(list(new.values())), strict=True))
                part.add(loaded, hidden)
                if part.num_waiting >= clips_per_shard:
                    part.write()
                bar.update(len(batch))
        part.write()

    @contextmanager
    def _tower_on_device(self) -> Iterator[None]:
        """Move the audio encoder to the device, where --fsdp moves it only when training begins."""
        tower = self.model.audio_tower
        device = next(tower.parameters()).device
        is_elsewhere = device.type != self.run.device.type
        if is_elsewhere:
            tower.to(self.run.device)
        yield
        if is_elsewhere:
            tower.to(device)

    @torch.no_grad()
    def _run_encoder(self, features: list[Tensor]) -> Tensor:
        """Return the outputs (clips, tokens, width) of the features of clips, on the CPU."""
        tower = self.model.audio_tower
        weight = next(tower.parameters())
        inputs = torch.stack(features).to(weight.device, weight.dtype)
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=self.run.bf16):
            return tower(inputs).cpu()
