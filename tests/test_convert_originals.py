"""Converts every kind of original file into a folder and back.

Keys and shapes are those of the golden layouts, values follow the golden rule. The audio encoders
are narrow (CAV-MAE 64 wide with two blocks; TLTR of Whisper tiny), so that a file is small.
`test_a_file_of_several_gigabytes` measures the memory for a large file (slow: 4 GB of disk twice).
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import ltu_as.convert_checkpoint  # noqa: F401  registers LTU-AS with the Auto classes
from ltu import LtuConfig, LtuForConditionalGeneration, LtuProcessor, convert_checkpoint
from ltu.checkpoints import save_checkpoint
from ltu.checkpoints.convert import lora_settings
from ltu.checkpoints.original_checkpoints import ORIGINAL_KEYS, PREFIX, TO_ORIGINAL, rename_keys
from ltu.files import run_command
from ltu_as import LtuAsConfig
from tests import tiny
from tests.golden.rule_init import rule
from tests.released import narrow, read, write_llm

COMMANDS = {"ltu": convert_checkpoint.main, "ltu_as": ltu_as.convert_checkpoint.main}
FLAGS = {"ltu": [], "ltu_as": ["--whisper", "tiny"]}
CONFIGS = {"ltu": LtuConfig, "ltu_as": LtuAsConfig}
# Kinds of files that users of the original have: a stage of the layout, which of its lists, and a
# change of its keys.
FILES = {
    "trainable_only": ("tiny.lora_all", "saved_by_trainer", str),
    "stage1": ("tiny.stage1_proj", "saved_by_trainer", str),
    "unprefixed": ("tiny.lora_all", "saved_by_trainer", lambda key: key.removeprefix(PREFIX)),
    "mixed": (
        "tiny.lora_all",
        "saved_by_trainer",
        lambda key: key.removeprefix(PREFIX) if "norm" in key else key,
    ),
    "without_default": (
        "tiny.lora_all",
        "saved_by_trainer",
        lambda key: key.replace(".default", ""),
    ),
    "full": ("tiny.stage2_all", "peft_state_dict", str),
    "full_unprefixed": ("tiny.stage2_all", "peft_state_dict", lambda key: key.removeprefix(PREFIX)),
    "full_with_lora": ("tiny.lora_all", "peft_state_dict", str),
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llm(tmp_path_factory.mktemp("originals") / "llm")


@pytest.fixture(scope="module")
def nameplate(llm: Path) -> Path:
    """Config and tokenizer of the language model, without its weights."""
    shutil.copytree(llm, llm.parent / "nameplate", ignore=shutil.ignore_patterns("*.safetensors"))
    return llm.parent / "nameplate"


def content(kind: str, name: str) -> dict[str, torch.Tensor]:
    stage, which, change = FILES[name]
    shapes = narrow(read(f"layout_{kind}")[stage][which])
    return {change(key): torch.from_numpy(rule(key, tuple(shape))) for key, shape in shapes.items()}


def command(kind: str, *flags: str | Path) -> None:
    COMMANDS[kind]([str(flag) for flag in flags])


def convert(kind: str, state: dict | Path, llm: Path, folder: Path, *flags: str) -> Path:
    file = state if isinstance(state, Path) else folder.with_suffix(".bin")
    if not isinstance(state, Path):
        torch.save(state, file)
    command(kind, "--llm", llm, "--checkpoint", file, "--output_dir", folder, *FLAGS[kind], *flags)
    return folder


def logits(folder: Path, **options) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    audio_encoder = model.config.audio_config
    shape = (4, 25, 384)
    if hasattr(audio_encoder, "num_mel_bins"):
        shape = (audio_encoder.num_frames, audio_encoder.num_mel_bins)
    features = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    tokens = [model.config.audio_token_id] * model.config.num_audio_tokens + list(range(1, 9))
    with torch.no_grad():
        return model(torch.tensor([tokens]), input_features=features).logits


# --- every kind of file in, and out again


# Prefixes do not depend on the kind.
ROUND_TRIPS = [("ltu", name) for name in FILES]
ROUND_TRIPS += [("ltu_as", name) for name in ("trainable_only", "stage1", "full", "full_with_lora")]


@pytest.mark.parametrize("kind, name", ROUND_TRIPS)
def test_round_trip(
    golden_report, llm: Path, nameplate: Path, tmp_path: Path, kind: str, name: str
) -> None:
    """File -> folder -> file: the order of keys in the original's Trainer, and every value."""
    state = content(kind, name)
    full = name.startswith("full")
    folder = convert(kind, state, nameplate if full else llm, tmp_path / "folder")
    command(kind, "--model", folder, "--to_original", tmp_path / "back.bin")
    back = torch.load(tmp_path / "back.bin", weights_only=True)
    stage, which, _ = FILES[name]
    expected = [key for key in read(f"layout_{kind}")[stage][which] if "rotary" not in key]
    expected = list(narrow(dict.fromkeys(expected, ())))
    golden_report("original files", f"{kind} {name}, keys in order", list(back) != expected, 0)
    theirs, change = content(kind, name), FILES[name][2]
    different = [key for key in back if not torch.equal(back[key], theirs[change(key)])]
    golden_report("original files", f"{kind} {name}, values {different[:3]}", len(different), 0)
    record = json.loads((folder / "ltu_state.json").read_text())
    assert set(record["dropped_keys"]) == {key for key in state if "rotary" in key}
    assert (record.get("language_model") == "in this folder") == full
    assert (AutoConfig.from_pretrained(folder).language_model is None) == full
    num_bytes = sum(value.nbytes for value in back.values())
    assert (tmp_path / "back.bin").stat().st_size < 1.05 * num_bytes + 2e5


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_full_file_answers_as_its_parts(
    llm: Path, nameplate: Path, tmp_path: Path, kind: str, monkeypatch
) -> None:
    """The language model may be in its own folder or in the file, in shards or not.

    The golden rule gives the same weights for both.
    """
    parts = logits(convert(kind, content(kind, "trainable_only"), llm, tmp_path / "parts"))
    monkeypatch.setattr(save_checkpoint, "SHARD", "500KB")
    whole = convert(kind, content(kind, "full_with_lora"), nameplate, tmp_path / "whole")
    assert (
        len(list(whole.glob("model-*-of-*.safetensors"))) > 2
        and (whole / "model.safetensors.index.json").is_file()
    )
    assert torch.equal(logits(whole), parts)
    monkeypatch.undo()  # Written again in one file: the shards must go.
    assert torch.equal(
        logits(convert(kind, content(kind, "full_with_lora"), nameplate, whole)), parts
    )
    assert [file.name for file in whole.glob("model*")] == ["model.safetensors"]
    half = convert(
        kind, content(kind, "full"), nameplate, tmp_path / "half", "--llm_dtype", "bfloat16"
    )
    model = AutoModelForCausalLM.from_pretrained(half)
    assert (
        model.language_model.dtype == torch.bfloat16
        and model.multi_modal_projector.linear.weight.dtype.itemsize == 4
    )
    state = content(kind, "full")
    without_head = {key: value for key, value in state.items() if "lm_head" not in key}
    with pytest.raises(ValueError, match="lm_head"):
        convert(kind, without_head, nameplate, tmp_path / "lacking")


def test_a_released_vicuna_folder(llm: Path, tmp_path: Path) -> None:
    """vicuna_ltu has two .bin shards, with audio encoder and projection.

    It is used as a language model, for the initial checkpoint of stage 1, and as a whole model.
    """
    state = content("ltu", "full_unprefixed")
    shutil.copytree(llm, tmp_path / "vicuna_ltu", ignore=shutil.ignore_patterns("*.safetensors"))
    for index, odd in enumerate((False, True)):
        items = list(state.items())
        shard = dict(items[int(odd) :: 2])
        torch.save(shard, tmp_path / "vicuna_ltu" / f"pytorch_model-0000{index + 1}-of-00002.bin")
    weight_map = {
        key: f"pytorch_model-0000{number % 2 + 1}-of-00002.bin" for number, key in enumerate(state)
    }
    (tmp_path / "vicuna_ltu" / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    vicuna = tmp_path / "vicuna_ltu"
    command(
        "ltu",
        "--init",
        "--llm",
        vicuna,
        "--audio_encoder",
        vicuna,
        "--output_dir",
        tmp_path / "init",
    )
    whole = convert("ltu", vicuna, vicuna, tmp_path / "whole")
    assert torch.equal(logits(tmp_path / "init"), logits(whole))
    merged = convert("ltu", content("ltu", "trainable_only"), vicuna, tmp_path / "converted")
    command("ltu", "--model", merged, "--merge", "--output_dir", tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(merged), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["legacy", "safetensors", "unlike_name"])
def test_a_file_is_what_its_bytes_say(llm: Path, tmp_path: Path, form: str) -> None:
    state = content("ltu", "trainable_only")
    file = tmp_path / ("pytorch_model.bin" if form != "unlike_name" else "x.zip")
    if form == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=form != "legacy")
    folder = convert("ltu", file, llm, tmp_path / "folder")
    command("ltu", "--model", folder, "--to_original", tmp_path / "back.bin")
    back = torch.load(tmp_path / "back.bin", weights_only=True)
    assert all(torch.equal(back[key], value) for key, value in state.items())
    assert len(back) == len(state)


# --- refused files: one line with reason, path and hint; nothing is written


class Evil:
    def __reduce__(self):
        return (print, ("a pickle ran code",))


def cut(state: dict, file: Path, fraction: float, **options) -> None:
    torch.save(state, file, **options)
    file.write_bytes(file.read_bytes()[: int(fraction * file.stat().st_size)])


def without(part: str) -> Callable[[dict, Path], None]:
    return lambda state, file: torch.save(
        {key: value for key, value in state.items() if part not in key}, file
    )


REFUSED = {
    "truncated": (
        lambda state, file: cut(state, file, 0.7),
        "cannot be read.*cut short, download it again",
    ),
    "truncated_legacy": (
        lambda state, file: cut(state, file, 0.7, _use_new_zipfile_serialization=False),
        "cannot be read.*cut short, download it again",
    ),
    "truncated_header": (lambda state, file: cut(state, file, 1e-5), "neither|cut short"),
    "truncated_safetensors": (
        lambda state, file: (save_file(state, file), file.write_bytes(file.read_bytes()[:-9])),
        "cannot be read.*cut short, download it again",
    ),
    "empty": (lambda state, file: file.touch(), "is empty. Download"),
    "web_page": (
        lambda state, file: file.write_text("\n<!DOCTYPE html><html>"),
        "is a web page.*Download",
    ),
    "noise": (
        lambda state, file: file.write_bytes(bytes(range(200))),
        "neither a torch file nor safetensors",
    ),
    "code": (
        lambda state, file: torch.save(state | {"a": Evil()}, file),
        "print.*run code, so it is refused.*safetensors",
    ),
    "legacy_code": (
        lambda state, file: torch.save(
            state | {"a": Evil()}, file, _use_new_zipfile_serialization=False
        ),
        "print.*run code, so it is refused.*safetensors",
    ),
    "foreign": (
        lambda state, file: torch.save({"bert.pooler.weight": torch.zeros(3)}, file),
        "bert.pooler.weight",
    ),
    "optimizer": (lambda state, file: torch.save({"state": state}, file), "is not a state dict"),
    "twice": (
        lambda state, file: torch.save(
            state | {key.removeprefix(PREFIX): state[key] for key in list(state)[:1]}, file
        ),
        "both mean",
    ),
    "without_audio_encoder": (without("audio_encoder"), "no audio encoder"),
    "without_projection": (without("audio_proj"), "keys missing.*multi_modal_projector"),
    "another_width": (
        lambda state, file: torch.save(
            state | {f"{PREFIX}model.audio_proj.1.bias": torch.zeros(3)}, file
        ),
        "1 keys of another shape.*linear.bias: .3. for .64.",
    ),
    "half_of_lora": (without("lora_B"), "keys missing.*lora_B"),
    "a_layer_less": (without("layers.1."), "keys missing.*layers.1"),
    "adapter_alone": (without("audio_"), "no audio encoder"),
    "absent": (lambda state, file: None, "is not there"),
}


def refused(capsys, kind: str, *flags: str | Path) -> str:
    """Return the line with which a command ends."""
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: command(kind, *flags))
    message = str(stop.value.code)  # A string: Python prints it and leaves with status 1.
    assert message.startswith("error: ") and "\n" not in message
    assert "a pickle ran code" not in capsys.readouterr().out
    return message


def conversion_flags(llm: Path, file: Path) -> list[str | Path]:
    """Return the flags that convert a file into the folder `out` next to it."""
    return ["--llm", llm, "--checkpoint", file, "--output_dir", file.with_name("out")]


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", COMMANDS)
def test_refused(llm: Path, tmp_path: Path, capsys, kind: str, name: str) -> None:
    write, pattern = REFUSED[name]
    write(content(kind, "trainable_only"), tmp_path / "file.bin")
    message = refused(capsys, kind, *conversion_flags(llm, tmp_path / "file.bin"), *FLAGS[kind])
    assert re.search(pattern, message), message
    assert "file.bin" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind, other", [("ltu", "ltu_as"), ("ltu_as", "ltu")])
def test_the_other_kind(llm: Path, tmp_path: Path, capsys, kind: str, other: str) -> None:
    """A file or folder of LTU given to LTU-AS's command, or the reverse: the right one is named."""
    torch.save(content(other, "trainable_only"), tmp_path / "file.bin")
    message = refused(capsys, kind, *conversion_flags(llm, tmp_path / "file.bin"), *FLAGS[kind])
    assert f"not the audio encoder of {kind}." in message
    assert f"python -m {other}.convert_checkpoint" in message
    folder = convert(other, content(other, "trainable_only"), llm, tmp_path / "folder")
    for flags in (
        ("--to_original", tmp_path / "back.bin"),
        ("--merge", "--output_dir", tmp_path / "out"),
    ):
        message = refused(capsys, kind, "--model", folder, *flags)
        assert f"python -m {other}.convert_checkpoint" in message
    assert not (tmp_path / "out").exists() and not (tmp_path / "back.bin").exists()


def test_wrong_use(llm: Path, tmp_path: Path, capsys) -> None:
    folder = convert("ltu", content("ltu", "trainable_only"), llm, tmp_path / "folder")
    for flags in (
        ["--llm", llm, "--output_dir", tmp_path / "out"],
        ["--model", folder, "--merge"],
        ["--model", folder, "--to_original", "x.bin", "--output_dir", "out"],
        ["--to_original", "x.bin"],
        ["--checkpoint", "x.bin", "--output_dir", "out"],
        ["--model", folder, "--merge", "--output_dir", folder],
        ["--llm", llm, "--checkpoint", "x.bin", "--output_dir", llm],
        ["--llm", llm, "--init", "--output_dir", "out", "--llm_dtype", "float16"],
    ):
        with pytest.raises(SystemExit) as stop:
            command("ltu", *flags)
        assert stop.value.code == 2
    flags = conversion_flags(tmp_path / "nowhere", tmp_path / "folder.bin")
    assert "nowhere" in refused(capsys, "ltu", *flags)
    merging = ("--model", folder, "--merge")
    another = tiny.write_llm(tmp_path / "another")
    flags = ("--llm", another, "--output_dir", tmp_path / "out")
    message = refused(capsys, "ltu", *merging, *flags)
    assert "hash" in message and not (tmp_path / "out").exists()
    assert "not ours" in refused(capsys, "ltu", *merging, "--output_dir", llm)
    assert (llm / "model.safetensors").is_file()
    flags = conversion_flags(llm, tmp_path / "folder.bin")
    assert "does not apply" in refused(capsys, "ltu", *flags, "--llm_dtype", "float16")
    command("ltu", *merging, "--output_dir", tmp_path / "merged")
    flags = ("--model", tmp_path / "merged", "--merge", "--output_dir", tmp_path / "out")
    message = refused(capsys, "ltu", *flags)
    assert "nothing to merge" in message


# --- merging

LLMS = {  # Linear, Conv1D (fan_in_fan_out), one matrix for three, tied embeddings.
    "llama": ["q_proj", "v_proj", "down_proj", "lm_head"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "gpt_neox": ["query_key_value"],
    "qwen2": ["q_proj", "v_proj"],
}


# peft sets fan_in_fan_out for GPT-2's Conv1D by itself, as it should, and says so.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("name", LLMS)
def test_merged_answers_equal(tmp_path: Path, name: str, monkeypatch) -> None:
    """fp32, to 1e-5, from a self-contained folder in several shards.

    The folder of the language model is removed.
    """
    monkeypatch.setattr(save_checkpoint, "SHARD", "100KB")
    if name == "qwen2":
        monkeypatch.setitem(tiny.LLM, "tie_word_embeddings", True)
    llm = tiny.write_llm(tmp_path / "llm", name)
    folder = tiny.write_checkpoint(
        tmp_path / "folder", llm, tiny.LORA | {"target_modules": LLMS[name]}
    )
    unmerged, plain = logits(folder), logits(tiny.write_checkpoint(tmp_path / "plain", llm))
    assert (unmerged - plain).abs().max() > 1e-2  # LoRA changes something.
    command("ltu", "--model", folder, "--merge", "--output_dir", tmp_path / "merged")
    shutil.rmtree(llm)
    shutil.rmtree(folder)
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert (
        config.lora is None
        and config.language_model is None
        and config.language_model_sha256 is None
    )
    assert (
        json.loads((tmp_path / "merged" / "ltu_state.json").read_text())["language_model"]
        == "in this folder"
    )
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(logits(tmp_path / "merged"), unmerged, atol=1e-5, rtol=0)
    LtuProcessor.from_pretrained(tmp_path / "merged")


def test_merge_keeps_the_stored_dtype(tmp_path: Path) -> None:
    llm = tiny.write_llm(tmp_path / "llm", dtype=torch.bfloat16)
    folder = tiny.write_checkpoint(tmp_path / "folder", llm, tiny.LORA)
    unmerged = logits(folder, dtype=torch.float32)
    for flags, dtype in (((), torch.bfloat16), (("--llm_dtype", "float32"), torch.float32)):
        command("ltu", "--model", folder, "--merge", "--output_dir", tmp_path / "merged", *flags)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert (
            model.language_model.dtype == dtype
            and model.multi_modal_projector.linear.weight.dtype == torch.float32
        )
    torch.testing.assert_close(logits(tmp_path / "merged"), unmerged, atol=1e-5, rtol=0)


def test_lora_in_the_folder_of_its_language_model_stays_fp32(tmp_path: Path) -> None:
    """Also if the language model is opened in bf16; settings of another one are refused."""
    folder = tiny.write_checkpoint(tmp_path / "folder", tiny.write_llm(tmp_path / "llm"), tiny.LORA)
    command("ltu", "--model", folder, "--merge", "--output_dir", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    model.add_lora(4, 8, 0.0, ["q_proj"])
    model.save_pretrained(tmp_path / "trained")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype="bfloat16")
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if ".lora_" in name} == {torch.float32}
    assert dtypes["language_model.model.embed_tokens.weight"] == torch.bfloat16
    for given in ({"device_map": "cpu"}, {"language_model": str(tmp_path / "llm")}):
        with pytest.raises(ValueError, match="holds its language model"):
            LtuForConditionalGeneration.from_pretrained(tmp_path / "trained", **given)


def test_nothing_is_lost(tmp_path: Path, capsys, monkeypatch) -> None:
    """No other files are overwritten, and a conversion that was stopped can be repeated."""

    def stop(*args) -> None:
        raise KeyboardInterrupt

    llm = tiny.write_llm(tmp_path / "llm")
    folder = tiny.write_checkpoint(tmp_path / "folder", llm, tiny.LORA)
    out = tmp_path / "out"
    flags = ("--model", folder, "--merge", "--output_dir", out)
    with monkeypatch.context() as patch:
        patch.setattr(LtuProcessor, "save_pretrained", stop)
        with pytest.raises(KeyboardInterrupt):
            command("ltu", *flags)
    assert not out.exists()
    command("ltu", *flags)
    command("ltu", *flags)  # A conversion may replace the folder of another.
    assert not list(tmp_path.glob(".*.part"))
    state = json.loads((out / "ltu_state.json").read_text())
    (out / "ltu_state.json").write_text(json.dumps(state | {"stage": "stage4_all_mix"}))
    assert "a trained checkpoint (stage4_all_mix)" in refused(capsys, "ltu", *flags)
    (out / "ltu_state.json").unlink()
    assert "not ours" in refused(capsys, "ltu", *flags)
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    (pickles / "pytorch_model.bin").write_bytes(b"x")
    assert "not ours" in refused(capsys, "ltu", *flags[:-1], pickles)


def test_a_stage_of_the_originals_trainer(llm: Path, tmp_path: Path) -> None:
    """Its folder has weights, but no config; and two names of one storage are two tensors."""
    state = content("ltu", "full")
    (tmp_path / "checkpoint-9000").mkdir()
    head = next(key for key in state if key.endswith("lm_head.weight"))
    state[head] = state[next(key for key in state if key.endswith("embed_tokens.weight"))]
    torch.save(state, tmp_path / "checkpoint-9000" / "pytorch_model.bin")
    folder = convert("ltu", tmp_path / "checkpoint-9000", llm, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder).language_model
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("full", [False, True])
def test_merge_of_ltu_as(llm: Path, nameplate: Path, tmp_path: Path, full: bool) -> None:
    """With a language model elsewhere, and with one in the folder together with its LoRA."""
    state = content("ltu_as", "full_with_lora" if full else "trainable_only")
    folder = convert("ltu_as", state, nameplate if full else llm, tmp_path / "folder")
    settings = json.loads((folder / "processor_config.json").read_text())
    assert settings["feature_extractor"]["transcript_rule"] == "original"
    command("ltu_as", "--model", folder, "--merge", "--output_dir", tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(folder), atol=1e-5, rtol=0)
    record = json.loads((tmp_path / "merged" / "ltu_state.json").read_text())
    assert {"merged"} == set(record["dropped_keys"].values()) and len(record["dropped_keys"]) == 8


# peft warns of the same danger, but goes on.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_lora_on_a_tied_weight_is_not_merged(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(tiny.LLM, "tie_word_embeddings", True)
    llm = tiny.write_llm(tmp_path / "llm")
    folder = tiny.write_checkpoint(
        tmp_path / "folder", llm, tiny.LORA | {"target_modules": ["lm_head"]}
    )
    message = refused(capsys, "ltu", "--model", folder, "--merge", "--output_dir", tmp_path / "out")
    assert "cannot be merged" in message and not (tmp_path / "out").exists()


# --- 7B and 13B, on the meta device


def as_13b(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return the layout of 13B by that of 7B: 5120 and 13824 wide, 40 layers.

    No width of an audio encoder is 4096.
    """
    wide = {4096: 5120, 11008: 13824}
    shapes = {key: [wide.get(size, size) for size in shape] for key, shape in shapes.items()}
    first = {key: shape for key, shape in shapes.items() if ".layers.0." in key}
    return shapes | {
        key.replace(".0.", f".{n}.", 1): shape
        for key, shape in first.items()
        for n in range(32, 40)
    }


SIZES = {"7B": {}, "13B": {"hidden_size": 5120, "intermediate_size": 13824}}
SIZES["13B"] |= {"num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40}


# A file of stage 1 has the keys of a later one without LoRA: 13B is tested with LoRA alone.
STAGES = [("real7b.stage1_proj", "7B"), ("real7b.lora_all", "7B"), ("real7b.lora_all", "13B")]


@pytest.mark.parametrize("stage, size", STAGES)
@pytest.mark.parametrize("which", ["saved_by_trainer", "peft_state_dict"])
@pytest.mark.parametrize("kind", COMMANDS)
def test_keys_of_7b_and_13b(golden_report, kind: str, stage: str, which: str, size: str) -> None:
    """Every key is placed, none is missing, all get their names back, and the folder is small."""
    shapes = read(f"layout_{kind}")[stage][which]
    shapes = as_13b(shapes) if size == "13B" else shapes
    file = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    state, dropped = rename_keys(file, ORIGINAL_KEYS, (PREFIX,), "the layout")
    config = CONFIGS[kind](
        text_config={"model_type": "llama"} | SIZES[size],
        language_model="llm" if which == "saved_by_trainer" else None,
        lora=lora_settings(state, 16, 0.05),
    )
    keys = save_checkpoint.match_keys(state, save_checkpoint.build_on_meta(config), "the file")
    assert all("rotary" in key for key in dropped)
    back, _ = rename_keys(dict.fromkeys(keys), TO_ORIGINAL, (), "the folder")
    golden_report(
        "names", f"{kind} {stage} {which} {size}, back", set(back) != set(shapes) - set(dropped), 0
    )
    stored = sum(state[key].numel() for key in keys)
    if which == "saved_by_trainer":
        golden_report("names", f"{kind} {stage} {size}, bytes of the folder", 4 * stored, 400e6)
        if (size, stage) == ("7B", "real7b.lora_all"):
            golden_report(
                "names", f"{kind}, count", stored != read(f"layout_{kind}")[stage]["n_trainable"], 0
            )


# --- a file larger than what a conversion may need

MEASURE = """
import json, resource, sys, threading, time
from ltu.convert_checkpoint import main

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) / 1e6

peak, done = status("RssAnon"), threading.Event()
start = peak
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, status("RssAnon"))
watcher = threading.Thread(target=watch)
watcher.start()
began = time.time()
main(sys.argv[1:])
done.set()
watcher.join()
resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
seconds = time.time() - began
print(json.dumps({"start": start, "peak": peak, "resident": resident, "seconds": seconds}))
"""
WIDE = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 3,
    "vocab_size": 32_000,
}
WIDE |= {"num_attention_heads": 32, "num_key_value_heads": 32}


def measure(*flags: str | Path) -> dict[str, float]:
    """Return the GB that a command needs in a process of its own.

    `peak` counts memory that is the process's own (RssAnon, read every 2 ms). `resident` also
    counts pages of mapped files, which the kernel keeps while there is room.
    """
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, flags)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_file_of_several_gigabytes(golden_report, nameplate: Path, tmp_path: Path) -> None:
    """Three layers of 7B in fp32 with LoRA are converted and merged in the memory of a tensor."""
    config = json.loads((nameplate / "config.json").read_text()) | WIDE
    shutil.copytree(nameplate, tmp_path / "llm")
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config))
    shapes = read("layout_ltu")["real7b.lora_all"]["peft_state_dict"]
    shapes = {
        key: shape for key, shape in shapes.items() if not re.search(r"layers\.([3-9]|\d\d)\.", key)
    }
    state = {key: torch.rand(shape) for key, shape in shapes.items()}
    torch.save(state, tmp_path / "full_ft.bin")
    size = (tmp_path / "full_ft.bin").stat().st_size / 1e9
    assert size > 3.5
    measured = measure(
        "--llm",
        tmp_path / "llm",
        "--checkpoint",
        tmp_path / "full_ft.bin",
        "--output_dir",
        tmp_path / "whole",
    )
    print(f"full fine-tuned, {size:.2f} GB: {measured}")
    golden_report(
        "memory", "GB to convert a full fine-tuned file", measured["peak"] - measured["start"], 0.6
    )
    key = "lm_head.weight"
    index = json.loads((tmp_path / "whole" / "model.safetensors.index.json").read_text())[
        "weight_map"
    ]
    with safe_open(tmp_path / "whole" / index[f"language_model.{key}"], "pt") as stored:
        assert torch.equal(stored.get_tensor(f"language_model.{key}"), state[PREFIX + key])
    del state
    (tmp_path / "full_ft.bin").unlink()
    measured = measure(
        "--model", tmp_path / "whole", "--merge", "--output_dir", tmp_path / "merged"
    )
    print(f"merged: {measured}")
    golden_report("memory", "GB to merge LoRA", measured["peak"] - measured["start"], 0.6)
    shutil.rmtree(tmp_path)
