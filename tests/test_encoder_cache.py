"""Tests that training with `--encoder_cache` equals training without it, whatever the cache holds.

A clip is encoded once for its content, and a file that is cut, damaged or of another encoder is
never used.
"""

import json
import logging
import pickle
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ltu.data.dataset_parser import DatasetError
from ltu.files import run_command
from ltu.finetune import main
from ltu.models.audio_front_end import AudioFrontEnd
from ltu.models.modeling_cavmae import CavMaeModel
from ltu.training import encoder_cache
from ltu.training.arguments import parse_args
from ltu.training.collator import LtuCollator
from ltu.training.encoder_cache import DigestTable
from ltu.training.trainer import make_trainer
from tests.interruption import damage
from tests.machine import PATIENCE
from tests.tiny import LORA, clip, start_ranks, write_checkpoint, write_llm, write_rows
from tests.tiny import training_flags as flags

FROZEN = {"freeze_audio_tower": True, "num_epochs": 2}
NUM_CLIPS = 9  # Of 12 examples; the first three have none.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    return write_checkpoint(root / "checkpoint", write_llm(root / "llm"), LORA)


@pytest.fixture(scope="module")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset file of 12 examples."""
    return write_rows(tmp_path_factory.mktemp("rows"), 12, without_audio=3)


@pytest.fixture(scope="module")
def plain_losses(checkpoint: Path, data_path: Path, tmp_path_factory) -> list[float]:
    """The losses of 6 steps without a cache."""
    output = tmp_path_factory.mktemp("plain") / "run"
    main(flags(checkpoint, data_path, output, **FROZEN))
    return losses(output)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of clips of each forward pass of the audio encoder."""
    counts: list[int] = []
    stock_forward = CavMaeModel.forward

    def forward(self: CavMaeModel, input_features: torch.Tensor, **kwargs) -> torch.Tensor:
        counts.append(len(input_features))
        return stock_forward(self, input_features, **kwargs)

    monkeypatch.setattr(CavMaeModel, "forward", forward)
    return counts


def losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def train(
    checkpoint: Path, data_path: Path, folder: Path, name: str, **more: object
) -> list[float]:
    """Train with the cache `folder/cache`, and return the losses."""
    settings = FROZEN | {"encoder_cache": folder / "cache"} | more
    main(flags(checkpoint, data_path, folder / name, **settings))
    return losses(folder / name)


def one_line_of(arguments: list[str]) -> str:
    """Return the line with which a command ends."""
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main(arguments))
    line = str(end.value.code)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("workers", ["0", "1", "auto"])
def test_losses_equal_those_without_a_cache(
    checkpoint, data_path, tmp_path, plain_losses, encoded, workers
):
    """In the order of the examples, with rows without audio, and in a second run and stage."""
    found = train(checkpoint, data_path, tmp_path, "first", num_workers=workers)
    assert found == pytest.approx(plain_losses, abs=1e-6)
    assert sum(encoded) == NUM_CLIPS
    encoded.clear()
    found = train(checkpoint, data_path, tmp_path, "second", num_workers=workers)
    assert found == pytest.approx(plain_losses, abs=1e-6)
    assert not encoded
    settings = {"trainable_params": "proj", "freeze_audio_tower": False}
    train(checkpoint, data_path, tmp_path, "stage1", num_workers=workers, **settings)
    assert not encoded


def test_no_audio_is_decoded_once_the_cache_is_full(
    checkpoint, data_path, tmp_path, plain_losses, monkeypatch
):
    train(checkpoint, data_path, tmp_path, "first")

    def fail(*_: object) -> None:
        raise AssertionError("audio is decoded")

    monkeypatch.setattr(AudioFrontEnd, "load_features", fail)
    found = train(checkpoint, data_path, tmp_path, "second")
    assert found == pytest.approx(plain_losses, abs=1e-6)


def test_held_out_examples_are_cached_too(checkpoint, data_path, tmp_path, encoded):
    settings = {"val_set_size": 4, "save_steps": 2}
    main(flags(checkpoint, data_path, tmp_path / "plain", **FROZEN, **settings))
    encoded.clear()
    train(checkpoint, data_path, tmp_path, "cached", **settings)
    assert sum(encoded) == NUM_CLIPS
    found = []
    for name in ("plain", "cached"):
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        found.append([entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry])
    assert len(found[0]) == 2
    assert found[1] == pytest.approx(found[0], abs=1e-6)


def test_only_clips_that_the_run_uses_are_encoded(checkpoint, data_path, tmp_path, encoded):
    train(checkpoint, data_path, tmp_path, "run", max_steps=1)
    arguments = flags(checkpoint, data_path, tmp_path / "run", **FROZEN, max_steps=1)
    trainer = make_trainer(*parse_args(arguments))
    examples = trainer.train_dataset.examples
    used = {examples[index]["audio"] for batch in trainer.micro_batches for index in batch}
    assert sum(encoded) == len(used - {None}) < NUM_CLIPS


def test_a_run_resumes_with_and_without_the_cache(checkpoint, data_path, tmp_path, plain_losses):
    """The flag may differ, since it changes no loss."""
    settings = {"save_steps": 2, "save_total_limit": 9}
    train(checkpoint, data_path, tmp_path, "whole", **settings)
    for name, cache in (("with", {"encoder_cache": tmp_path / "cache"}), ("without", {})):
        resumed = {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-2"}
        main(
            flags(checkpoint, data_path, tmp_path / name, **FROZEN, **settings, **resumed, **cache)
        )
        assert losses(tmp_path / name)[-4:] == pytest.approx(plain_losses[-4:], abs=1e-6)


@pytest.mark.parametrize("is_sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ranks_share_the_work(checkpoint, data_path, tmp_path, plain_losses, is_sharded):
    """Each rank encodes a part, and all read all of it; also with FSDP."""
    settings = FROZEN | {"encoder_cache": tmp_path / "cache", "disable_tqdm": True}
    arguments = flags(checkpoint, data_path, tmp_path / "two", **settings)
    module = "ltu.finetune"
    if is_sharded:
        module = "tests.finetune_on_gloo"
        arguments += ["--fsdp", "--fsdp_config", "train_scripts/configs/fsdp.json"]
    for rank in start_ranks(2, module, arguments, tmp_path / "log"):
        rank.join(PATIENCE)
        assert rank.exitcode == 0, (tmp_path / "log.0").read_text()[-3000:]
    # Two ranks with half the accumulation train on the same examples in a step.
    assert losses(tmp_path / "two") == pytest.approx(plain_losses, abs=2e-5)
    line = f"has {NUM_CLIPS} of the {NUM_CLIPS} clips of this run, {NUM_CLIPS} of them encoded now"
    assert line in (tmp_path / "log.0").read_text()
    assert len(list(tmp_path.glob("cache/*/hidden-*"))) == 2


def test_two_runs_fill_one_folder_at_once(
    checkpoint, data_path, tmp_path, plain_losses, monkeypatch
):
    """A run that begins and ends while another one encodes disturbs neither."""
    stock_encode = encoder_cache.CacheFiller._encode
    inner = []

    def encode(self: encoder_cache.CacheFiller, *args: object) -> None:
        if not inner:
            inner.append(None)
            inner.append(train(checkpoint, data_path, tmp_path, "inner"))
        stock_encode(self, *args)

    monkeypatch.setattr(encoder_cache.CacheFiller, "_encode", encode)
    outer = train(checkpoint, data_path, tmp_path, "outer")
    assert outer == inner[1] == pytest.approx(plain_losses, abs=1e-6)
    assert len(list(tmp_path.glob("cache/*/hidden-*"))) == 2


def test_equal_content_is_encoded_once(checkpoint, tmp_path, encoded):
    """Of files with different names, and of one that is moved."""
    data_path = write_rows(tmp_path / "rows", 4)
    shutil.copy(data_path.parent / "0.wav", data_path.parent / "3.wav")  # In two micro-batches.
    train(checkpoint, data_path, tmp_path, "run")
    assert sum(encoded) == 3
    moved = data_path.parent.rename(tmp_path / "moved") / data_path.name
    encoded.clear()
    train(checkpoint, moved, tmp_path, "again")
    assert not encoded


def test_a_clip_that_is_replaced_is_encoded_again(checkpoint, tmp_path, encoded):
    data_path = write_rows(tmp_path / "rows", 4)
    train(checkpoint, data_path, tmp_path, "run")
    encoded.clear()
    soundfile.write(data_path.parent / "2.wav", clip(77), 16_000)
    found = train(checkpoint, data_path, tmp_path, "again")
    assert sum(encoded) == 1
    main(flags(checkpoint, data_path, tmp_path / "plain", **FROZEN))
    assert found == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)


def test_a_clip_that_changes_while_it_is_read_is_not_cached(
    checkpoint, tmp_path, encoded, monkeypatch
):
    """Otherwise its output would be found under the hash of the other content."""
    data_path = write_rows(tmp_path / "rows", 4)
    stock_load = AudioFrontEnd.load_features

    def load(self: AudioFrontEnd, example: dict) -> torch.Tensor:
        if example["audio_id"] == "2.wav":
            soundfile.write(example["audio"], clip(len(encoded), 0.6), 16_000)
        return stock_load(self, example)

    monkeypatch.setattr(AudioFrontEnd, "load_features", load)
    train(checkpoint, data_path, tmp_path, "run", num_epochs=1)
    # Three at the start, the fourth in the step, because it has no output.
    assert sum(encoded[:-1]) == 3
    assert encoded[-1] == 1


def test_another_encoder_uses_no_output_of_the_first(checkpoint, data_path, tmp_path, encoded):
    train(checkpoint, data_path, tmp_path, "run")
    folder = tmp_path / "other"
    other = write_checkpoint(folder, Path(checkpoint).parent / "llm", LORA, seed=1)
    encoded.clear()
    train(other, data_path, tmp_path, "run2")
    assert sum(encoded) == NUM_CLIPS
    encoded.clear()
    # Other settings of the features.
    shutil.copytree(checkpoint, tmp_path / "settings")
    path = tmp_path / "settings" / "processor_config.json"
    config = json.loads(path.read_text())
    config["feature_extractor"]["mean"] = 0.5
    path.write_text(json.dumps(config))
    llm = Path(checkpoint).parent / "llm"
    train(tmp_path / "settings", data_path, tmp_path, "run3", llm=llm)
    assert sum(encoded) == NUM_CLIPS
    encoded.clear()
    # Another precision.
    train(checkpoint, data_path, tmp_path, "run4", bf16=True)
    assert sum(encoded) == NUM_CLIPS


@pytest.mark.parametrize("kind", ["cut", "changed", "missing"])
@pytest.mark.parametrize("pattern", ["clips-*", "*/hidden-*"])
def test_damaged_files_are_not_used(
    checkpoint, data_path, tmp_path, plain_losses, encoded, kind, pattern
):
    train(checkpoint, data_path, tmp_path, "first")
    [path] = (tmp_path / "cache").glob(pattern)
    damage(path, kind)
    encoded.clear()
    found = train(checkpoint, data_path, tmp_path, "second")
    assert found == pytest.approx(plain_losses, abs=1e-6)
    assert encoded or pattern == "clips-*"


def test_an_output_with_a_wrong_bit_is_computed_again(
    checkpoint, data_path, tmp_path, plain_losses, encoded, caplog
):
    train(checkpoint, data_path, tmp_path, "first")
    [path] = (tmp_path / "cache").glob("*/hidden-*")
    content = bytearray(path.read_bytes())
    with encoder_cache.safe_open(path, "pt") as file:
        first = file.get_tensor("hidden")[0].numpy().tobytes()
    content[content.index(first) + 3] ^= 1
    path.write_bytes(content)
    encoded.clear()
    with caplog.at_level(logging.WARNING, "ltu"):
        found = train(checkpoint, data_path, tmp_path, "second")
    assert found == pytest.approx(plain_losses, abs=1e-6)
    # The one clip, in each of two epochs.
    assert encoded == [1, 1]
    warnings = [record.getMessage() for record in caplog.records if "damaged" in record.message]
    assert len(warnings) == 1 and str(path) in warnings[0]


def test_a_full_disk_is_one_line_and_keeps_what_is_written(
    checkpoint, data_path, tmp_path, encoded, monkeypatch
):
    settings = FROZEN | {"encoder_cache": tmp_path / "cache", "micro_batch_size": 1}
    arguments = flags(checkpoint, data_path, tmp_path / "run", **settings)
    # One clip per file; the third file is too large.
    monkeypatch.setattr(encoder_cache, "MAX_SHARD_BYTES", 1)
    stock_write = encoder_cache.EncoderOutputs.write
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    num_files = []

    def write(self: encoder_cache.EncoderOutputs, outputs: dict) -> str:
        num_files.append(None)
        size = 100 if len(num_files) == 3 else unlimited[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
        try:
            return stock_write(self, outputs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    monkeypatch.setattr(encoder_cache.EncoderOutputs, "write", write)
    line = one_line_of(arguments)
    assert line.startswith(f"error: {tmp_path}/cache/") and "cannot be written" in line
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    assert not (tmp_path / "run" / "ltu_state.json").exists()
    encoded.clear()
    main(arguments)
    assert sum(encoded) == NUM_CLIPS - 2


def test_too_small_a_disk_is_refused_before_the_work(
    checkpoint, data_path, tmp_path, encoded, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)
    small = usage._replace(free=1000)
    monkeypatch.setattr(encoder_cache.shutil, "disk_usage", lambda path: small)
    arguments = flags(
        checkpoint, data_path, tmp_path / "run", **FROZEN, encoder_cache=tmp_path / "cache"
    )
    line = one_line_of(arguments)
    # 9 clips of 2 tokens x 32 values x 4 bytes.
    assert "needs 2.3e-06 GB, but its disk has 1e-06 GB free" in line
    assert not encoded


def test_clips_that_cannot_be_decoded_are_skipped_and_counted(checkpoint, tmp_path):
    data_path = write_rows(tmp_path / "rows", 8)
    (data_path.parent / "1.wav").write_bytes(b"not audio")
    (data_path.parent / "2.wav").unlink()
    settings = {"max_bad": 2, "num_workers": 1}
    found = train(checkpoint, data_path, tmp_path, "run", **settings)
    main(flags(checkpoint, data_path, tmp_path / "plain", **FROZEN, **settings))
    assert found == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)
    state = json.loads((tmp_path / "run" / "ltu_state.json").read_text())
    assert sorted(state["skipped"]) == ["1.wav", "2.wav"]
    with pytest.raises(DatasetError, match="more than --max_bad 1"):
        train(checkpoint, data_path, tmp_path, "run2", max_bad=1)


def test_a_dataset_without_audio_needs_no_cache(checkpoint, tmp_path):
    data_path = write_rows(tmp_path / "rows", 4, without_audio=4)
    assert train(checkpoint, data_path, tmp_path, "run", text_only=True)


@pytest.mark.parametrize("plan", ["all", "full"])
def test_a_trained_encoder_is_refused(checkpoint, data_path, tmp_path, capsys, plan):
    arguments = flags(
        checkpoint, data_path, tmp_path / "run", encoder_cache=tmp_path, trainable_params=plan
    )
    with pytest.raises(SystemExit) as end:
        parse_args(arguments)
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--encoder_cache needs an audio encoder that is not trained" in line
    parse_args([*arguments, "--freeze_audio_tower", "True"])


def test_a_folder_that_cannot_be_made_is_one_line(checkpoint, data_path, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = flags(
        checkpoint, data_path, tmp_path / "run", **FROZEN, encoder_cache=tmp_path / "file" / "cache"
    )
    assert "--encoder_cache" in one_line_of(arguments)


def test_plan_says_the_size_and_show_batch_writes_nothing(checkpoint, data_path, tmp_path, capsys):
    arguments = flags(
        checkpoint, data_path, tmp_path / "run", **FROZEN, encoder_cache=tmp_path / "cache"
    )
    main([*arguments, "--plan"])
    line = f"encoder cache: {tmp_path}/cache, up to 9 clips of 0.256 kB = 2.3e-06 GB"
    assert line in capsys.readouterr().out.splitlines()
    main([*arguments, "--show_batch"])
    assert "input_features" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


def test_a_batch_of_encoded_and_other_clips(checkpoint, data_path, tmp_path):
    """Clips of which the cache has no output are encoded with the batch, each at its place."""
    settings = FROZEN | {"encoder_cache": tmp_path / "cache"}
    trainer = make_trainer(*parse_args(flags(checkpoint, data_path, tmp_path / "run", **settings)))
    cached = trainer.train_dataset
    read = cached.read_encoded
    items = []
    for index in (3, 0, 4, 5, 6):
        cached.read_encoded = read if index in (4, 6) else None
        items.append(cached.load(index))
    assert [item["audio_hidden_states"] is not None for item in items] == [0, 0, 1, 0, 1]
    cached.read_encoded = None
    plain = [cached.load(index) for index in (3, 0, 4, 5, 6)]
    collate = LtuCollator(trainer.processing_class)
    with torch.no_grad():
        found = trainer.model(**collate(items)).logits
        expected = trainer.model(**collate(plain)).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_reader_can_be_spawned(checkpoint, data_path, tmp_path):
    settings = FROZEN | {"encoder_cache": tmp_path / "cache"}
    trainer = make_trainer(*parse_args(flags(checkpoint, data_path, tmp_path / "run", **settings)))
    item = trainer.train_dataset[5]  # Opens a file.
    copy = pickle.loads(pickle.dumps(trainer.train_dataset))
    assert torch.equal(copy[5]["audio_hidden_states"], item["audio_hidden_states"])


def test_digests_are_found_by_all_their_bytes():
    digests = np.zeros((3, 32), np.uint8)
    digests[0, 0] = 9
    digests[1, 31] = 1
    table = DigestTable(digests)
    assert table.find(digests[0].tobytes()) == 0
    assert table.find(bytes(7) + b"\1" + bytes(24)) is None
    # Of two with the same first bytes, one is found, and never one for the other.
    found = [table.find(digest.tobytes()) for digest in digests[1:]]
    assert found in ([1, None], [None, 2])
    assert DigestTable(digests[:0]).find(bytes(32)) is None
