"""Tests that any audio encoder of transformers works as LTU's audio encoder, by its config alone.

The audio tokens are compared with what transformers computes without our code.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
import whisper
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

from ltu.checkpoints.wrap_audio_encoder import wrap_audio_encoder
from ltu.convert_checkpoint import main as convert
from ltu.data.audio import load_audio
from ltu.finetune import main as finetune
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import Request
from ltu.models.configuration_ltu import YamnetConfig
from ltu.models.modeling_audio_encoder_wrapper import AudioEncoderWrapperModel
from ltu.models.modeling_yamnet import YamnetModel
from ltu.serving.gradio_page import draw_spectrogram
from ltu_as.convert_checkpoint import main as convert_as
from tests import tiny
from tests.audio_encoders import FAMILIES, expected_tokens, write_audio_model
from tests.test_serve import serve, write_served_model
from tests.whisper_tiny import save_whisper
from train_scripts.quickstart.whisper_to_transformers import convert as whisper_to_transformers

ROOT = Path(__file__).parents[1]
SPEECH = sorted((ROOT / "data" / "toy" / "speech").glob("*.flac"))[0]
NUM_TOKENS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, and the audio models by the names of their families."""
    root = tmp_path_factory.mktemp("encoders")
    tiny.write_llm(root / "llm")
    for name, family in FAMILIES.items():
        write_audio_model(root / name, family)
    return root


@pytest.fixture(scope="module")
def write_initial(root: Path) -> Callable[[str], Path]:
    """Return a function that writes the initial checkpoint of a family once."""

    def write(name: str) -> Path:
        folder = root / f"{name}-init"
        if not folder.is_dir():
            flags = ["--init", "--llm", str(root / "llm"), "--audio_encoder", str(root / name)]
            flags += ["--num_audio_tokens", str(NUM_TOKENS), "--output_dir", str(folder)]
            convert([*flags, "--chunk_seconds", str(FAMILIES[name].chunk_seconds)])
        return folder

    return write


def whole_chunk(name: str, seed: int = 1) -> np.ndarray:
    return tiny.clip(seed, FAMILIES[name].chunk_seconds)


def trained(start: Path, output: Path, **flags: object) -> Path:
    """Train two steps from a checkpoint folder."""
    data = tiny.write_rows(output.parent / "rows", 4, without_audio=1)
    finetune(tiny.training_flags(start, data, output, max_steps=2, **flags))
    return output


def audio_config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["audio_config"]


@pytest.mark.parametrize("name", FAMILIES)
class TestEachFamily:
    def test_tokens_are_those_of_transformers(
        self, root: Path, write_initial: Callable[[str], Path], name: str
    ) -> None:
        folder = write_initial(name)
        model = AutoModelForCausalLM.from_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder)
        batch = processor(text=["What?"], audio=[whole_chunk(name)])
        with torch.no_grad():
            tokens = model.audio_tower(batch["input_features"])[0]
        expected = expected_tokens(root / name, FAMILIES[name], whole_chunk(name), NUM_TOKENS)
        assert tokens.shape == expected.shape
        assert (tokens - expected).abs().max() < 1e-5
        assert tokens.std() > 1e-3

    def test_both_stages(
        self, write_initial: Callable[[str], Path], name: str, tmp_path: Path
    ) -> None:
        """A frozen encoder stays named; one that is trained is in the checkpoint."""
        start = write_initial(name)
        first = trained(start, tmp_path / "first", trainable_params="proj")
        assert audio_config_of(first)["encoder"] is not None
        second = trained(first, tmp_path / "second", trainable_params="all")
        assert audio_config_of(second)["encoder"] is None
        before = AutoModelForCausalLM.from_pretrained(first)
        after = AutoModelForCausalLM.from_pretrained(second)
        changed = set()
        for key, value in after.audio_tower.encoder.state_dict().items():
            if not torch.equal(value, before.audio_tower.encoder.state_dict()[key]):
                changed.add(key)
        assert changed

        # What is saved is what is opened.
        after.save_pretrained(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        for key, value in after.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), key

    def test_batch_chunks_and_page(self, write_initial: Callable[[str], Path], name: str) -> None:
        engine = LtuEngine.from_pretrained(write_initial(name), "cpu")
        seconds = FAMILIES[name].chunk_seconds
        requests = [
            Request("What is it?", tiny.clip(1, seconds * 2.5), num_chunks=0),
            Request("Is it loud?", tiny.clip(2, seconds / 3)),
            Request("Why?", None),
            Request("Where?", tiny.clip(3, seconds * 2.5), num_chunks=2),
        ]
        decoding = {"max_new_tokens": 8, "do_sample": False}
        together = [answer for _, answer in sorted(engine.run(requests, 4, **decoding))]
        alone = [next(iter(engine.run([request], 1, **decoding)))[1] for request in requests]
        assert [answer.text for answer in together] == [answer.text for answer in alone]
        assert all(answer.answered for answer in together)
        used = [round(answer.seconds_heard / seconds, 3) for answer in together]
        assert used == [2.5, 0.333, 0, 2]
        png = draw_spectrogram(tiny.clip(1, 2.0), engine.processor.feature_extractor)
        assert png.startswith(b"\x89PNG")

    def test_exactly_the_named_parameters_get_no_gradient(self, root: Path, name: str) -> None:
        wrapped = wrap_audio_encoder(root / name, NUM_TOKENS, FAMILIES[name].chunk_seconds)
        model = AudioEncoderWrapperModel(wrapped.config).eval()
        features = torch.randn(1, *wrapped.config.feature_shape)
        model(features).square().sum().backward()
        idle = {key for key, parameter in model.named_parameters() if parameter.grad is None}
        assert idle == set(model.unused_parameter_names)

    def test_encoder_lora(
        self, write_initial: Callable[[str], Path], name: str, tmp_path: Path
    ) -> None:
        """LoRA alone is trained, the encoder stays named, and merging changes nothing."""
        start = write_initial(name)
        targets = f"[{','.join(FAMILIES[name].lora)}]"
        output = trained(start, tmp_path / "lora", encoder_lora_target_modules=targets)
        assert audio_config_of(output)["encoder"] is not None
        card = (output / "README.md").read_text()
        family = FAMILIES[name].config.model_type
        assert f"{family} of transformers ({name}, not in this folder) with LoRA of rank 8" in card
        assert f"of the audio encoder ({family} of transformers)\n" in card
        before = AutoModelForCausalLM.from_pretrained(start).audio_tower
        model = AutoModelForCausalLM.from_pretrained(output)
        state = {key.replace(".base_layer.", "."): value for key, value in _state(model).items()}
        for key, value in before.state_dict().items():
            assert torch.equal(value, state[key]), key
        products = [value for key, value in state.items() if ".lora_B." in key]
        assert products and all(product.abs().max() > 0 for product in products)

        flags = ["--model", str(output), "--merge", "--output_dir", str(tmp_path / "merged")]
        convert(flags)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert merged.config.encoder_lora is None and merged.config.audio_config.encoder is None
        features = torch.randn(1, *model.config.audio_config.feature_shape)
        with torch.no_grad():
            difference = merged.audio_tower(features) - model.audio_tower(features)
        assert difference.abs().max() < 1e-4


PRETRAINED_WHISPER = ROOT / "pretrained_mdls" / "whisper-tiny.en" / "whisper.pt"


def check_whisper(file: str, llm: Path, tmp_path: Path) -> None:
    """Compare the audio tokens of a clip with the output of openai-whisper's own encoder."""
    whisper_to_transformers(file, tmp_path / "whisper")
    flags = f"--init --llm {llm} --audio_encoder {tmp_path}/whisper --output_dir {tmp_path}/init"
    convert(flags.split())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "init")
    processor = AutoProcessor.from_pretrained(tmp_path / "init")
    clip = load_audio(SPEECH)
    original = whisper.load_model(file, device="cpu")
    mel = whisper.log_mel_spectrogram(clip, original.dims.n_mels, padding=whisper.audio.N_SAMPLES)
    mel = whisper.pad_or_trim(mel, whisper.audio.N_FRAMES)
    with torch.no_grad():
        tokens = model.audio_tower(processor(text="What?", audio=clip)["input_features"])[0]
        # 512 positions of 20 ms are 10.24 s.
        expected = original.encoder(mel[None])[0, :512].unflatten(0, (32, 16)).mean(1)
    assert (tokens - expected).abs().max() < 1e-4 * expected.abs().max()


def test_whisper_of_openai(root: Path, tmp_path: Path) -> None:
    check_whisper(save_whisper(tmp_path / "whisper.pt"), root / "llm", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not PRETRAINED_WHISPER.is_file(), reason="needs Whisper tiny.en (quickstart)")
def test_pretrained_whisper(root: Path, tmp_path: Path) -> None:
    check_whisper(str(PRETRAINED_WHISPER), root / "llm", tmp_path)


BY_HUB_ID = """
from ltu.convert_checkpoint import main
from transformers import AutoModelForCausalLM
flags = "--init --llm {llm} --audio_encoder tiny/whisper --output_dir {output}"
main(flags.split())
model = AutoModelForCausalLM.from_pretrained("{output}")
print(model.config.audio_config.encoder, len(model.config.audio_config.encoder_sha256))
"""


@pytest.mark.slow  # A process of its own, because huggingface_hub reads its settings at import.
def test_an_encoder_by_its_hub_id(root: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--tiny--whisper"
    shutil.copytree(root / "whisper", cached / "snapshots" / "0123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    code = BY_HUB_ID.format(llm=root / "llm", output=tmp_path / "init")
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "tiny/whisper 64"


@pytest.mark.parametrize("name", ["nowhere/encoder.pth", "./nowhere"])
def test_no_such_file(root: Path, tmp_path: Path, name: str) -> None:
    flags = f"--init --llm {root}/llm --audio_encoder {name} --output_dir {tmp_path}/out"
    with pytest.raises((ValueError, OSError), match="nowhere"):
        convert(flags.split())


def test_a_checkpoint_is_no_audio_encoder(
    root: Path, write_initial: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = write_initial("whisper")
    flags = f"--init --llm {root}/llm --audio_encoder {checkpoint} --output_dir {tmp_path}/out"
    with pytest.raises(ValueError, match=str(checkpoint)):
        convert(flags.split())


def test_lora_of_layers_that_are_not_used(root: Path, tmp_path: Path) -> None:
    """With --encoder_layers 1, LoRA on q_proj trains in the first layer only."""
    flags = f"--init --llm {root}/llm --audio_encoder {root}/whisper --encoder_layers 1"
    convert([*flags.split(), "--chunk_seconds", "1.28", "--output_dir", str(tmp_path / "init")])
    output = trained(tmp_path / "init", tmp_path / "run", encoder_lora_target_modules="[q_proj]")
    state = load_file(output / "model.safetensors")
    key = "audio_tower.encoder.layers.{}.self_attn.q_proj.lora_B.default.weight"
    assert state[key.format(0)].abs().max() > 0
    assert state[key.format(1)].abs().max() == 0


REFUSED_LORA = {
    "its attention uses the weights of q_proj, but does not call it": (
        "wavlm",
        "[q_proj]",
        "LoRA on .*q_proj has no effect",
    ),
    "an encoder that reads an attribute of the layer": ("whisper", "[conv1]", "does not run with"),
    "a layer that peft does not know": ("whisper", "[layer_norm]", "peft cannot add LoRA of r 8"),
    "a convolution with groups": ("wav2vec2", "[conv]", "could not be merged"),
}


@pytest.mark.parametrize("case", REFUSED_LORA)
def test_lora_that_cannot_work_is_refused(
    write_initial: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    case: str,
) -> None:
    name, targets, expected = REFUSED_LORA[case]
    rows = tiny.write_rows(tmp_path / "rows", 4)
    flags = tiny.training_flags(write_initial(name), rows, tmp_path / "run")
    flags += ["--encoder_lora_target_modules", targets]
    assert re.search(expected, refused(flags, capsys, finetune))
    assert not (tmp_path / "run" / "config.json").exists()


def test_lora_that_the_tokens_do_not_depend_on_is_refused(root: Path, tmp_path: Path) -> None:
    flags = f"--init --llm {root}/llm --audio_encoder {root}/whisper --encoder_layers 0"
    convert([*flags.split(), "--chunk_seconds", "1.28", "--output_dir", str(tmp_path / "init")])
    with pytest.raises(ValueError, match="the audio tokens do not depend on these layers"):
        trained(tmp_path / "init", tmp_path / "run", encoder_lora_target_modules="[q_proj]")


def test_the_original_has_no_lora_on_its_audio_encoder(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    start = tiny.write_checkpoint(tmp_path / "start", root / "llm")
    output = trained(start, tmp_path / "run", encoder_lora_target_modules="[qkv]")
    assert "with LoRA of rank 8 on ['qkv'], 2 embeddings" in (output / "README.md").read_text()
    export = ["--to_original", str(tmp_path / "original.pth")]
    message = refused(["--model", str(output), *export], capsys)
    assert "has LoRA on its audio encoder, which the original has not" in message
    assert not (tmp_path / "original.pth").exists()
    convert(["--model", str(output), "--merge", "--output_dir", str(tmp_path / "merged")])
    convert(["--model", str(tmp_path / "merged"), *export])
    keys = torch.load(tmp_path / "original.pth", weights_only=True).keys()
    assert not [key for key in keys if "lora" in key or "base_layer" in key]


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return model.audio_tower.state_dict()


@pytest.mark.parametrize("name", ["whisper", "wav2vec2", "ast"])
@pytest.mark.parametrize("layer", ["mean", 1, -1, 0])
def test_other_layers(root: Path, name: str, layer: int | str) -> None:
    family = FAMILIES[name]
    config = wrap_audio_encoder(root / name, NUM_TOKENS, family.chunk_seconds, layer).config
    wrapper = AudioEncoderWrapperModel(config).eval()
    wrapper.load_encoder()
    features = torch.randn(1, *config.feature_shape)
    model = AutoModel.from_pretrained(root / name).eval()
    encoder = model.encoder if name == "whisper" else model
    with torch.no_grad():
        states = encoder(features, output_hidden_states=True).hidden_states
        expected = torch.stack(states).mean(0) if layer == "mean" else states[layer]
        assert (wrapper(features) - _pool(wrapper, expected)).abs().max() < 1e-6


def _pool(wrapper: AudioEncoderWrapperModel, hidden: torch.Tensor) -> torch.Tensor:
    steps = wrapper._time_steps(hidden)[:, : wrapper.config.num_time_steps]
    pooled = torch.nn.functional.adaptive_avg_pool1d(steps.transpose(1, 2), NUM_TOKENS)
    return pooled.transpose(1, 2)


def test_a_frozen_encoder_has_no_dropout_and_can_be_cached(
    write_initial: Callable[[str], Path], tmp_path: Path
) -> None:
    start = write_initial("wav2vec2")
    assert audio_config_of(start)["encoder_config"]["layerdrop"] == 0.0
    states = []
    for name in ("plain", "cached", "cached_again"):
        flags = {} if name == "plain" else {"encoder_cache": tmp_path / "cache"}
        output = trained(start, tmp_path / name, trainable_params="proj", **flags)
        states.append(load_file(output / "model.safetensors"))
    for key, value in states[0].items():
        assert torch.equal(states[1][key], states[2][key])
        assert (states[1][key] - value).abs().max() < 1e-5, key


@pytest.mark.parametrize("name", ["whisper", "wav2vec2"])
def test_a_plan_of_memory(
    write_initial: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    rows = tiny.write_rows(tmp_path / "rows", 4)
    flags = tiny.training_flags(write_initial(name), rows, tmp_path / "run")
    finetune([*flags, "--plan", "--gpu_memory", "24"])
    assert "GiB" in capsys.readouterr().out


def test_the_server(root: Path, tmp_path: Path) -> None:
    write_served_model(tmp_path)
    flags = ["--init", "--llm", str(tmp_path / "llm"), "--audio_encoder", str(root / "whisper")]
    convert([*flags, "--chunk_seconds", "1.28", "--output_dir", str(tmp_path / "wrapped")])
    engine = LtuEngine.from_pretrained(tmp_path / "wrapped", "cpu")
    with serve(engine) as running:
        text = running.answer_alone("What is it?", str(SPEECH))
        reply = running.client.chat.completions.create(
            model="tiny",
            max_tokens=12,
            messages=[{"role": "user", "content": audio_message(SPEECH, "What is it?")}],
        )
    assert isinstance(reply, openai.types.chat.ChatCompletion)
    assert reply.choices[0].message.content == text


def audio_message(clip: Path, question: str) -> list[dict]:
    data = b64encode(clip.read_bytes()).decode()
    audio = {"type": "input_audio", "input_audio": {"data": data, "format": "flac"}}
    return [audio, {"type": "text", "text": question}]


# --- refusals


def refused(flags: list[str], capsys: pytest.CaptureFixture, command: Callable = convert) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        command(flags)
    message = str(error.value)
    assert "\n" not in message
    return message


STEPS_A_SECOND = [
    ("whisper", 0.5, 25),
    ("whisper", 5, 250),
    ("whisper", 10, 500),
    ("whisper", 30, 1500),
    # The feature extractor repeats short clips; the first repetition is used.
    ("clap", 5, 16),
    # It normalises the whole chunk, so a change at the end changes all features.
    ("wav2vec2-bert", 0.5, 24),
]


@pytest.mark.parametrize(("name", "seconds", "num_steps"), STEPS_A_SECOND)
def test_time_steps_of_a_chunk(root: Path, name: str, seconds: float, num_steps: int) -> None:
    """50 positions a second for Whisper, whatever the length of the chunk; 32 in 10 s for CLAP."""
    assert wrap_audio_encoder(root / name, 1, seconds).config.num_time_steps == num_steps


def test_a_short_chunk_is_trained(root: Path, tmp_path: Path) -> None:
    """SpecAugment of wav2vec2 would fail, because its masks are longer than such a chunk."""
    flags = f"--init --llm {root}/llm --audio_encoder {root}/wav2vec2 --num_audio_tokens 2"
    convert([*flags.split(), "--chunk_seconds", "0.15", "--output_dir", str(tmp_path / "init")])
    trained(tmp_path / "init", tmp_path / "trained", trainable_params="all")


REFUSED = {
    "too many tokens": ("whisper", "--num_audio_tokens 65 --chunk_seconds 1.28", "Give at most 64"),
    "no such layer": ("whisper", "--encoder_layers 3", "layers 0 (its input) to 2"),
    "no such layers": ("whisper", "--encoder_layers all", "must be last, mean, or the number"),
    "layers of several shapes": (
        "clap",
        "--encoder_layers mean --chunk_seconds 10",
        "of which there is no mean",
    ),
    "crops clips": ("clap", "--chunk_seconds 10.24", "Give --chunk_seconds 10 or less"),
    "cuts clips": ("whisper", "--chunk_seconds 31", "Give --chunk_seconds 30 or less"),
    "cuts a tenth of a second": ("whisper", "--chunk_seconds 30.1", "Give --chunk_seconds 30 or"),
    "cuts spectrograms": ("ast", "--num_audio_tokens 4", "Give --chunk_seconds 1 or less"),
    "no length": ("whisper", "--chunk_seconds 0", "it must be from 0.1 to 3600"),
    "no tokens": ("whisper", "--num_audio_tokens 0", "it must be at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_weights_are_loaded(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture, case: str
) -> None:
    name, flags, expected = REFUSED[case]
    # Without weights: only config and feature extractor are needed to refuse.
    folder = shutil.copytree(root / name, tmp_path / name)
    (folder / "model.safetensors").unlink()
    start = f"--init --llm {root}/llm --audio_encoder {folder} --output_dir {tmp_path}/out"
    assert expected in refused([*start.split(), *flags.split()], capsys)
    assert not (tmp_path / "out").exists()


def test_other_models_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    start = f"--init --llm {root}/llm --output_dir {tmp_path}/out --audio_encoder"
    llm = tiny.write_llm(tmp_path / "gpt2", "gpt2", n_embd=64, n_layer=1, n_head=2)
    assert "without a feature extractor for audio" in refused([*start.split(), str(llm)], capsys)
    message = refused([*start.split(), str(root / "whisper"), "--whisper", "x"], capsys, convert_as)
    assert "python -m ltu.convert_checkpoint --init" in message
    flags = [*start.split()[:-1], "--num_audio_tokens", "8", "--chunk_seconds", "5"]
    message = refused(flags, capsys)
    assert "--chunk_seconds: only for an --audio_encoder of transformers" in message
    flags = [*start.split()[:-1], "--num_audio_tokens", "7"]
    assert "cavmae has 64 time steps. Give a number that divides it" in refused(flags, capsys)


def test_built_in_encoders_take_a_number_of_tokens(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """CAV-MAE of the original's file cannot have another number than the original's."""
    YamnetModel(YamnetConfig(hidden_size=64, num_classes=7)).save_pretrained(tmp_path / "yamnet")
    start = f"--init --llm {root}/llm --num_audio_tokens 8 --output_dir"
    convert([*start.split(), str(tmp_path / "yam"), "--audio_encoder", str(tmp_path / "yamnet")])
    convert([*start.split(), str(tmp_path / "cav")])
    for name in ("yam", "cav"):
        config = AutoConfig.from_pretrained(tmp_path / name)
        assert config.num_audio_tokens == config.audio_config.num_audio_tokens == 8
    message = refused(
        ["--model", str(tmp_path / "cav"), "--to_original", str(tmp_path / "out.bin")], capsys
    )
    assert "averages 8 time steps of cavmae into an audio token" in message
    assert not (tmp_path / "out.bin").exists()


WRONG_CONFIGS = {
    "sizes that do not fit": {"hidden_size": 31},
    "code of its own": {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig"}},
    "an unknown type": {"model_type": "mine"},
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_config_that_cannot_be_built_is_named(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture, case: str
) -> None:
    folder = shutil.copytree(root / "wav2vec2", tmp_path / "wrong")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | WRONG_CONFIGS[case]))
    flags = f"--init --llm {root}/llm --audio_encoder {folder} --output_dir {tmp_path}/out"
    message = refused([*flags.split(), "--chunk_seconds", "1.28"], capsys)
    assert str(folder) in message or "model type `mine`" in message


def test_missing_weights_are_not_made_up(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Weights that the output does not depend on may be missing, as in published wav2vec2."""
    model = AutoModel.from_pretrained(root / "wav2vec2")
    state = model.state_dict()
    start = f"--init --llm {root}/llm --chunk_seconds 1.28 --num_audio_tokens 4"
    for key, is_refused in (
        ("masked_spec_embed", False),
        ("encoder.layers.1.attention.q_proj.weight", True),
    ):
        folder = tmp_path / key
        less = {name: value for name, value in state.items() if name != key}
        model.save_pretrained(folder, state_dict=less)
        FAMILIES["wav2vec2"].extractor.save_pretrained(folder)
        flags = f"{start} --audio_encoder {folder} --output_dir {folder}-out".split()
        if is_refused:
            assert f"1 keys missing ['{key}']" in refused(flags, capsys)
        else:
            convert(flags)


def test_another_encoder_in_its_place_is_refused(
    root: Path, tmp_path: Path, write_initial: Callable[[str], Path]
) -> None:
    folder = shutil.copytree(write_initial("hubert"), tmp_path / "init")
    content = json.loads((folder / "config.json").read_text())
    content["audio_config"]["encoder"] = str(root / "wavlm")
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="was trained with an audio encoder whose hash is"):
        AutoModelForCausalLM.from_pretrained(folder)
    content["audio_config"]["encoder"] = "./nowhere"
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(FileNotFoundError, match="audio encoder .*nowhere is not there"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_flags_that_contradict_each_other(
    write_initial: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = tiny.write_rows(tmp_path / "rows", 4)
    flags = tiny.training_flags(write_initial("whisper"), rows, tmp_path / "run")
    flags += ["--encoder_lora_target_modules", "[q_proj]"]
    for more in (["--freeze_audio_tower", "True"], ["--trainable_params", "proj"]):
        with pytest.raises(SystemExit):
            finetune([*flags, *more])
        assert "--encoder_lora_target_modules with --" in capsys.readouterr().err
    flags[-1] = "[nowhere]"
    with pytest.raises(ValueError, match="--encoder_lora_target_modules '.NAME,NAME.'"):
        finetune(flags)


def test_the_config_is_written_relative_and_without_paths(
    write_initial: Callable[[str], Path], root: Path
) -> None:
    folder = write_initial("ast")
    text = (folder / "config.json").read_text() + (folder / "processor_config.json").read_text()
    assert str(root) not in text
    assert audio_config_of(folder)["encoder"] == "../ast"
    config = AutoConfig.from_pretrained(folder)
    assert config.num_audio_tokens == NUM_TOKENS
