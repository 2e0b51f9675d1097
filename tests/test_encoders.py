"""Compares both audio encoders of LTU with golden numbers, and tests them as transformers models.

test_golden_model.py compares the output of CAV-MAE with the original, because it opens the model.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.rule_init import rule
from transformers import AutoModel, PreTrainedModel

from ltu.data.audio import load_audio
from ltu.models.configuration_ltu import CavMaeConfig, YamnetConfig
from ltu.models.feature_extraction_ltu import YamnetFeatureExtractor
from ltu.models.modeling_cavmae import CavMaeModel, sincos_positions
from ltu.models.modeling_yamnet import SameConv2d, YamnetModel

ORIGINAL = "base_model.model.model.audio_encoder."
PRETRAINED_YAMNET = Path(__file__).parents[1] / "pretrained_mdls" / "yamnet"
TINY_SIZES = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40)
TINY = {
    "cavmae": (CavMaeModel, CavMaeConfig(num_mel_bins=32, num_frames=64, **TINY_SIZES), (64, 32)),
    "yamnet": (YamnetModel, YamnetConfig(hidden_size=64, num_classes=7, num_frames=96), (96, 64)),
}


def worst(got: torch.Tensor, expected: np.ndarray) -> float:
    assert tuple(got.shape) == expected.shape
    return np.abs(got.numpy() - expected).max()


def test_cavmae_has_the_originals_parameters(golden: Path) -> None:
    layouts = json.loads((golden / "layout_ltu.json").read_text())
    layout = layouts["tiny.lora_all"]["saved_by_trainer"]
    expected = {
        key.removeprefix(ORIGINAL): shape
        for key, shape in layout.items()
        if key.startswith(ORIGINAL)
    }
    with torch.device("meta"):
        model = CavMaeModel(CavMaeConfig())
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected
    assert list(model.state_dict()) == list(expected)
    assert model.num_parameters() == 85_721_088


def test_positions_start_as_in_the_original(golden: Path, golden_report) -> None:
    table = sincos_positions(8, 64, 768)[::8, ::8]
    error = worst(table, np.load(golden / "encoder_ltu.npz")["sincos_pos_embed"])
    golden_report("encoder (CAV-MAE)", "sincos_pos_embed", error, 1e-6)
    assert torch.equal(CavMaeModel(TINY["cavmae"][1]).pos_embed_a[0], sincos_positions(2, 4, 24))


def encode_noise(model: PreTrainedModel, shape: tuple[int, int], batch: int = 2) -> torch.Tensor:
    """Return the output of an audio encoder for noise."""
    generator = torch.Generator().manual_seed(0)
    return model(torch.randn(batch, *shape, generator=generator))


@pytest.mark.parametrize("kind", TINY)
class TestEveryAudioEncoder:
    def test_any_width_and_depth(self, kind: str) -> None:
        model_class, config, shape = TINY[kind]
        output = encode_noise(model_class(config), shape)
        assert output.shape == (2, config.num_audio_tokens, config.hidden_size)

    def test_exactly_the_named_parameters_get_no_gradient(self, kind: str) -> None:
        model_class, config, shape = TINY[kind]
        model = model_class(config)
        encode_noise(model, shape).square().sum().backward()
        idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        assert idle == set(model.unused_parameter_names)

    def test_batch_equals_single(self, kind: str) -> None:
        model_class, config, shape = TINY[kind]
        model = model_class(config).eval()
        spectrograms = torch.randn(3, *shape)
        with torch.no_grad():
            together = model(spectrograms)[1]
            alone = model(spectrograms[1:2])[0]
        assert (together - alone).abs().max() < 1e-5

    def test_saved_and_opened_by_the_auto_class(self, kind: str, tmp_path: Path) -> None:
        model_class, config, shape = TINY[kind]
        model = model_class(config).eval()
        model.save_pretrained(tmp_path)
        opened = AutoModel.from_pretrained(tmp_path).eval()
        assert type(opened) is model_class
        with torch.no_grad():
            assert torch.equal(encode_noise(opened, shape), encode_noise(model, shape))

    def test_initial_scale_is_sane(self, kind: str) -> None:
        torch.manual_seed(0)
        model_class, config, shape = TINY[kind]
        with torch.no_grad():
            output = encode_noise(model_class(config), shape)
        assert output.isfinite().all() and 1e-3 < output.std() < 10

    def test_bf16(self, kind: str) -> None:
        model_class, config, shape = TINY[kind]
        model = model_class(config).eval()
        with torch.no_grad():
            exact = encode_noise(model, shape)
            with torch.autocast("cpu", torch.bfloat16):
                autocast = encode_noise(model, shape)
            half = encode_noise(model.to(torch.bfloat16), shape)
        assert half.dtype == torch.bfloat16
        for rounded in (autocast, half):
            assert (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_any_choice_of_attention(self, kind: str, attention: str) -> None:
        model_class, config, _ = TINY[kind]
        assert type(AutoModel.from_config(config, attn_implementation=attention)) is model_class

    def test_wrong_shape_is_refused_with_both(self, kind: str) -> None:
        model_class, config, shape = TINY[kind]
        with pytest.raises(ValueError, match=rf"{shape[1]}\), got \(1, {shape[0]}, 7\)"):
            model_class(config)(torch.zeros(1, shape[0], 7))


# transformers 5.17 does not have the name that 5.24 recommends.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_nothing() -> None:
    model_class, config, shape = TINY["cavmae"]
    model = model_class(config).train()
    gradients = []
    for turn_on in (False, True):
        if turn_on:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        encode_noise(model, shape).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def load_rule_weights(model: YamnetModel) -> None:
    for name, parameter in model.named_parameters():
        values = torch.from_numpy(rule(name, tuple(parameter.shape)))
        is_convolution = parameter.ndim == 4
        parameter.data = values * 2**0.5 if is_convolution else values


@pytest.mark.parametrize("weights", ["rule", "pretrained"])
@torch.no_grad()
def test_yamnet_equals_an_onnx_runtime(golden: Path, golden_report, weights: str) -> None:
    if weights == "rule":
        model = YamnetModel(YamnetConfig()).eval()
        load_rule_weights(model)
    elif not (PRETRAINED_YAMNET / "model.safetensors").is_file():
        pytest.skip("the pretrained YAMNet is not there; quickstart.sh fetches it")
    else:
        model = YamnetModel.from_pretrained(PRETRAINED_YAMNET).eval()
    model.feature_mean.zero_()
    model.feature_std.fill_(1.0)
    assert model.num_parameters() == 3_729_481
    expected = np.load(golden / "yamnet.npz")
    clips = [load_audio(golden / "wav" / f"{clip}.wav") for clip in ("noise3", "tone4")]
    spectrograms = YamnetFeatureExtractor()(clips).input_features  # (2, 1024, 64)
    figures = {
        "logits": model.classify(spectrograms),
        "patch_logits": model.classify(spectrograms[:, :96]),
        "features": model(spectrograms)[:, :, ::8],
    }
    for name, figure in figures.items():
        figure_expected = expected[f"{weights}.{name}"]
        error = worst(figure, figure_expected) / max(1.0, np.abs(figure_expected).max())
        golden_report(f"YAMNet ({weights} weights)", name, error, 1e-5)


@pytest.mark.parametrize("size", [(96, 64), (7, 5), (8, 5), (1, 1), (2, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_is_tensorflows_same(size: tuple[int, int], stride: int) -> None:
    convolution = SameConv2d(1, 1, stride=stride)
    convolution.weight.data = torch.randn(1, 1, 3, 3)
    features = torch.randn(1, 1, *size)
    out = convolution(features)
    assert out.shape[-2:] == tuple(-(-length // stride) for length in size)
    # TensorFlow pads by max((ceil(n / s) - 1) * s + 3 - n, 0) in all, the smaller half in front.
    starts = [max((-(-n // stride) - 1) * stride + 3 - n, 0) // 2 for n in size]
    wide = torch.zeros(size[0] + 6, size[1] + 6)
    wide[3:-3, 3:-3] = features[0, 0]
    for row in range(out.shape[2]):
        for column in range(out.shape[3]):
            top = 3 - starts[0] + row * stride
            left = 3 - starts[1] + column * stride
            patch = wide[top : top + 3, left : left + 3]
            expected = (patch * convolution.weight[0, 0]).sum() + convolution.bias
            assert torch.allclose(out[0, 0, row, column], expected, atol=1e-5)


@torch.no_grad()
def test_standardisation_is_saved_with_the_weights(tmp_path: Path) -> None:
    model_class, config, shape = TINY["yamnet"]
    model = model_class(config).eval()
    plain = encode_noise(model, shape)
    model.feature_mean.fill_(0.25)
    model.feature_std.fill_(2.0)
    model.save_pretrained(tmp_path)
    opened = model_class.from_pretrained(tmp_path).eval()
    assert torch.allclose(encode_noise(opened, shape), (plain - 0.25) / 2.0, atol=1e-6)


@torch.no_grad()
def test_audio_tokens_of_yamnet_are_means_of_neighbours() -> None:
    model_class, config, shape = TINY["yamnet"]
    model = model_class(config).eval()
    steps = encode_noise(model, shape)  # (batch, steps, channels)
    assert steps.shape[1] == 3
    pooled_config = YamnetConfig(hidden_size=64, num_classes=7, num_frames=96, time_pooling=3)
    assert pooled_config.num_audio_tokens == 1
    pooled = model_class(pooled_config).eval()
    pooled.load_state_dict(model.state_dict())
    assert torch.allclose(encode_noise(pooled, shape), steps.mean(1, keepdim=True), atol=1e-6)
    with pytest.raises(ValueError, match="does not divide the 3 time steps"):
        YamnetConfig(num_frames=96, time_pooling=2)
