"""Tests the conversion of a CAV-MAE file, key by key, and the answers to single questions."""

import json

import pytest
import soundfile
import torch

from ltu import ask
from ltu.convert_checkpoint import main as convert
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import Request
from ltu.models.modeling_ltu import LtuForConditionalGeneration
from tests.tiny import LORA, audio_config, clip, write_checkpoint, write_llm


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return write_llm(tmp_path_factory.mktemp("llm") / "llm")


@pytest.fixture(scope="module")
def folder(llm):
    return write_checkpoint(llm.parent / "checkpoint", llm, LORA)


# --- the converter


def cav_mae_file(path, width=64):
    """Write a fine-tuned CAV-MAE with one audio block, as its authors save it.

    It has both branches and DataParallel's prefix.
    """
    state = {"pos_embed_a": torch.randn(1, 512, width), "modality_a": torch.randn(1, 1, width)}
    state |= {"pos_embed_v": torch.zeros(1, 196, width), "modality_v": torch.zeros(1, 1, width)}
    state |= {
        "patch_embed_a.proj.weight": torch.randn(width, 1, 16, 16),
        "patch_embed_a.proj.bias": torch.randn(width),
    }
    state |= {"patch_embed_v.proj.weight": torch.randn(width, 3, 16, 16)}
    for block in ("blocks_a.0", "blocks_u.0", "blocks_v.0"):
        for norm in ("norm1", "norm2", "norm1_a", "norm2_a", "norm1_v", "norm2_v"):
            state |= {
                f"{block}.{norm}.weight": torch.ones(width),
                f"{block}.{norm}.bias": torch.zeros(width),
            }
        for name, outputs, inputs in (
            ("attn.qkv", 3, 1),
            ("attn.proj", 1, 1),
            ("mlp.fc1", 4, 1),
            ("mlp.fc2", 1, 4),
        ):
            state[f"{block}.{name}.weight"] = torch.randn(outputs * width, inputs * width)
            state[f"{block}.{name}.bias"] = torch.randn(outputs * width)
    for norm in ("norm", "norm_a", "norm_v"):
        state |= {f"{norm}.weight": torch.ones(width), f"{norm}.bias": torch.zeros(width)}
    state |= {"mlp_head.1.weight": torch.zeros(527, width), "mask_token": torch.zeros(1, 1, 512)}
    state |= {
        "decoder_blocks.0.mlp.fc1.weight": torch.zeros(4, 4),
        "decoder_pos_embed_a": torch.zeros(1, 512, 512),
    }
    torch.save({f"module.{key}": value for key, value in state.items()}, path)
    return state


def convert_audio_encoder(llm, folder):
    flags = ["--init", "--llm", str(llm), "--audio_encoder", str(folder / "cav_mae.pth")]
    convert([*flags, "--output_dir", str(folder / "out")])


def test_init_from_a_cav_mae_file(llm, tmp_path, capsys):
    state = cav_mae_file(tmp_path / "cav_mae.pth")
    convert_audio_encoder(llm, tmp_path)
    model = LtuForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.config.audio_config.hidden_size == 64
    assert model.config.audio_config.num_hidden_layers == 2
    assert model.config.lora is None
    for key, value in model.audio_tower.state_dict().items():
        assert torch.equal(value, state[key]), key
    record = json.loads((tmp_path / "out" / "ltu_state.json").read_text())
    placed = {f"module.{key}" for key in model.audio_tower.state_dict()}
    assert set(record["dropped_keys"]) == {f"module.{key}" for key in state} - placed
    assert "none missing, none left over" in capsys.readouterr().out


def test_init_without_an_audio_encoder_warns(llm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ltu.checkpoints.convert.CavMaeConfig", audio_config)
    convert(["--init", "--llm", str(llm), "--output_dir", str(tmp_path / "out")])
    assert "RANDOM" in capsys.readouterr().err
    LtuForConditionalGeneration.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("change", ["stray", "missing", "shape"])
def test_a_key_that_does_not_fit_is_an_error(llm, tmp_path, change):
    state = cav_mae_file(tmp_path / "cav_mae.pth")
    if change == "stray":
        state["head.weight"] = torch.zeros(1)
    if change == "missing":
        del state["blocks_a.0.mlp.fc2.bias"]
    if change == "shape":
        state["norm_a.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "cav_mae.pth")
    messages = {"stray": "head.weight", "missing": "fc2.bias", "shape": "norm_a"}
    with pytest.raises(ValueError, match=messages[change]):
        convert_audio_encoder(llm, tmp_path)
    assert not (tmp_path / "out").exists()


# --- generation


@pytest.fixture
def clips(tmp_path):
    soundfile.write(tmp_path / "good.wav", clip(1, 0.8), 16_000)
    soundfile.write(tmp_path / "silent.wav", clip(1) * 0, 16_000)
    soundfile.write(tmp_path / "short.wav", clip(1, 0.02), 16_000)
    (tmp_path / "broken.wav").write_bytes(b"RIFF and nothing else")
    return tmp_path


def test_ask(folder, clips, capsys):
    arguments = ["--model", str(folder), "--max_new_tokens", "5", "--device", "cpu"]
    assert ask.main([str(clips / "good.wav"), "What is it?", *arguments]) == 0
    assert "used 0.64 of 0.80 seconds" in capsys.readouterr().err
    assert ask.main(["none", "What is it?", *arguments, "--original_decoding"]) == 0
    assert ask.main([str(clips / "broken.wav"), "What is it?", *arguments]) == 1
    assert "broken.wav" in capsys.readouterr().err


def test_batched_answers_equal_single_ones(folder):
    engine = LtuEngine.from_pretrained(folder, device="cpu")
    shared = clip(7)
    requests = [
        Request("Loud?", shared),
        Request("What is it, and why do you think so?", shared),
        Request("One?"),
    ]
    requests += [Request(f"{'so ' * n}?", clip(n, 0.3 + n)) for n in range(4)]
    alone = [engine([request], max_new_tokens=8)[0] for request in requests]
    for batch_size in (2, 3, 7):
        assert engine(requests, batch_size=batch_size, max_new_tokens=8) == alone
