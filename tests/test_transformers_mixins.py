"""Runs transformers' own tests of models (ModelTesterMixin, GenerationTesterMixin) on tiny models.

They are not in the wheel of transformers, and no text of them is here. `TRANSFORMERS_TESTS` names a
checkout of transformers, or its unpacked source distribution, of the installed version:

    pip download --no-deps --no-binary transformers transformers==VERSION
    tar xf transformers-VERSION.tar.gz
    pip install parameterized
    TRANSFORMERS_TESTS=transformers-VERSION pytest -m slow -rsx tests/test_transformers_mixins.py

The source distribution lacks the tests of generation and of export: a test that is skipped says so.

Every test that does not pass is listed here with its reason. It runs all the same, and the list is
wrong as soon as the test passes.
"""

import copy
import functools
import os
import sys
import unittest
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from transformers import LlamaConfig, PreTrainedConfig

from ltu import LtuConfig, LtuForConditionalGeneration
from ltu.models.configuration_ltu import YamnetConfig
from ltu.models.modeling_cavmae import CavMaeModel
from ltu.models.modeling_yamnet import YamnetModel
from ltu_as import LtuAsConfig, LtuAsForConditionalGeneration, TltrConfig
from ltu_as.modeling_tltr import TltrModel
from tests import tiny

pytestmark = pytest.mark.slow

FOLDER = os.environ.get("TRANSFORMERS_TESTS")
if FOLDER is None:
    pytest.skip(
        "TRANSFORMERS_TESTS names no checkout or source distribution of transformers",
        allow_module_level=True,
    )

# The package under which the tests of transformers are imported: ours is called `tests` too.
PACKAGE = "transformers_tests"
# What the source distribution lacks, and what stands in its place.
LACKING = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
}


def import_stock_tests(folder: Path) -> list[str]:
    """Make the tests of transformers importable as `transformers_tests`.

    Returns:
        The modules that the folder lacks, which have stand-ins without tests.
    """
    package = ModuleType(PACKAGE)
    package.__path__ = [str(folder / "tests")]
    sys.modules[PACKAGE] = package
    lacking = []
    for name, content in LACKING.items():
        if (folder / "tests" / f"{name.replace('.', '/')}.py").is_file():
            continue
        lacking.append(name)
        parent = f"{PACKAGE}.{name.partition('.')[0]}"
        sys.modules.setdefault(parent, ModuleType(parent))
        module = ModuleType(f"{PACKAGE}.{name}")
        vars(module).update(content)
        sys.modules[module.__name__] = module
    return lacking


NOT_RUN = import_stock_tests(Path(FOLDER))
with warnings.catch_warnings():
    # Their conftest.py declares their marks.
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
    ModelTesterMixin = import_module(f"{PACKAGE}.test_modeling_common").ModelTesterMixin
    GenerationTesterMixin = import_module(f"{PACKAGE}.generation.test_utils").GenerationTesterMixin
# The module imports transformers a second time, from a file that a source distribution lacks, and
# does not use it.
with patch("transformers.utils.direct_transformers_import"):
    ConfigTester = import_module(f"{PACKAGE}.test_configuration_common").ConfigTester


def fails(reasons: dict[str, str]) -> Callable[[type], type]:
    """Mark tests of a class, by their names, as failing, each with its reason."""

    def mark(cls: type) -> type:
        for name, reason in reasons.items():
            setattr(cls, name, expect_failure(getattr(cls, name), reason))
        return cls

    return mark


def expect_failure(test: Callable, reason: str) -> Callable:
    """Wrap a test so that the run fails as soon as the test passes."""

    @pytest.mark.xfail(reason=reason, strict=True)
    @functools.wraps(test)
    def run(self: unittest.TestCase) -> None:
        # The failure of a part would not be that of the test.
        with patch.object(self, "subTest", lambda *args, **kwargs: nullcontext()):
            test(self)

    return run


ENCODER_FAILURES = {
    "test_hidden_states_output": "An encoder returns the tensor of its audio tokens.",
    "test_model_outputs_equivalence": "An encoder returns the tensor of its audio tokens.",
    "test_retain_grad_hidden_states_attentions": "An encoder returns a tensor of audio tokens.",
    "test_model_get_set_embeddings": "An encoder has no token embeddings.",
}
MODEL_FAILURES = {
    "test_can_use_safetensors": "from_pretrained is strict: there is no loading info.",
    "test_load_save_without_tied_weights": "from_pretrained is strict: there is no loading info.",
    "test_model_weights_reload_no_missing_tied_weights": "The same: there is no loading info.",
    "test_from_pretrained_no_checkpoint": "from_pretrained opens a folder, and no state dict.",
    "test_cannot_load_with_meta_device_context_manager": "load_state_dict warns, and goes on.",
    "test_config_from_and_save_pretrained_composite": "config.json names no folder of the LLM.",
    **dict.fromkeys(
        (
            "test_get_audio_features_attentions",
            "test_get_audio_features_hidden_states",
            *(f"test_get_audio_features_output_{number}" for number in range(3)),
        ),
        "get_audio_features returns the tensor of audio embeddings.",
    ),
    "test_init_weights_can_init_buffers": "The parts initialise themselves, when they are built.",
    "test_inputs_embeds": "The placeholder is one past the vocabulary: it has no embedding.",
    "test_resize_embeddings_untied": "The placeholder is one past the vocabulary, so it moves.",
    "test_resize_tokens_embeddings": "The placeholder is one past the vocabulary, so it moves.",
    "test_model_base_model_prefix": "There is no separate model without a head.",
}


class EncoderTester:
    """Makes configs and inputs of an audio encoder."""

    is_training = False  # It has no loss of its own.
    batch_size = 7  # The size of the tests that compare attention implementations.
    num_hidden_layers = 2
    hidden_size = 32

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        self.seq_length = config.num_audio_tokens

    def get_config(self) -> PreTrainedConfig:
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict]:
        encoder = getattr(self.config, "audio_config", self.config)
        features = torch.randn(self.batch_size, *encoder.feature_shape)
        return self.get_config(), {"input_features": features}


class ModelTester(EncoderTester):
    """Makes configs and inputs of a model with a language model."""

    is_training = True
    vocab_size = 99
    num_attention_heads = 4

    def __init__(self, config_class: type[LtuConfig], audio_config: PreTrainedConfig):
        text_config = LlamaConfig(
            **(
                tiny.LLM
                | tiny.SPECIAL
                | {
                    "vocab_size": self.vocab_size,
                    "hidden_size": 32,
                    "num_key_value_heads": 2,
                    "head_dim": 8,
                    "intermediate_size": 36,
                }
            ),
            max_position_embeddings=64,
        )
        super().__init__(config_class(audio_config=audio_config, text_config=text_config))
        self.seq_length = self.config.num_audio_tokens + 10
        self.encoder_seq_length = self.seq_length

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict]:
        config, inputs = super().prepare_config_and_inputs_for_common()
        num_audio_tokens = config.num_audio_tokens
        input_ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        input_ids[:, :num_audio_tokens] = config.audio_token_id
        inputs["input_ids"] = input_ids
        inputs["attention_mask"] = torch.ones_like(input_ids)
        return config, inputs


class ConfigTests:
    """Makes a test of each check of transformers' `ConfigTester`."""

    config_tester: ConfigTester


def add_config_tests() -> None:
    for name in dir(ConfigTester):
        if name.startswith(("create_and_test_", "check_")):

            def run(self: ConfigTests, name: str = name) -> None:
                getattr(self.config_tester, name)()

            setattr(ConfigTests, f"test_{name.removeprefix('create_and_test_')}", run)


add_config_tests()


class EncoderTests(ConfigTests, ModelTesterMixin):
    config: PreTrainedConfig
    has_attentions = False  # No attention weights can be returned: always sdpa, or none.
    test_resize_embeddings = False

    def setUp(self) -> None:
        self.model_tester = EncoderTester(self.config)
        self.config_tester = ConfigTester(
            self,
            config_class=type(self.config),
            has_text_modality=False,
            common_properties=["hidden_size"],
        )


class ModelTests(ConfigTests, ModelTesterMixin, GenerationTesterMixin):
    config_class: type[LtuConfig]
    config: PreTrainedConfig
    _is_composite = True
    additional_model_inputs = ["input_features"]
    # CAV-MAE has norms that LTU does not use (`CavMaeBlock`).
    test_all_params_have_gradient = False

    def _prepare_for_class(
        self, inputs_dict: dict, model_class: type, return_labels: bool = False
    ) -> dict:
        """Add labels, which the stock method does for names of classes that it knows."""
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        if return_labels:
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
        return inputs

    def setUp(self) -> None:
        self.model_tester = ModelTester(self.config_class, self.config)
        self.config_tester = ConfigTester(
            self, config_class=self.config_class, has_text_modality=False
        )


@fails(ENCODER_FAILURES)
class TestCavMae(EncoderTests, unittest.TestCase):
    all_model_classes = (CavMaeModel,)
    config = tiny.audio_config()


@fails(ENCODER_FAILURES)
class TestYamnet(EncoderTests, unittest.TestCase):
    all_model_classes = (YamnetModel,)
    config = YamnetConfig(hidden_size=32, num_frames=64, num_classes=5)


@fails(ENCODER_FAILURES)
class TestTltr(EncoderTests, unittest.TestCase):
    all_model_classes = (TltrModel,)
    config = TltrConfig(hidden_size=32, num_whisper_layers=3, num_audio_tokens=4, num_layer_heads=2)


@fails(MODEL_FAILURES)
class TestLtu(ModelTests, unittest.TestCase):
    all_model_classes = (LtuForConditionalGeneration,)
    config_class = LtuConfig
    config = tiny.audio_config()


@fails(MODEL_FAILURES)
class TestLtuAs(ModelTests, unittest.TestCase):
    all_model_classes = (LtuAsForConditionalGeneration,)
    config_class = LtuAsConfig
    config = TestTltr.config


@pytest.mark.parametrize("name", LACKING)
def test_a_module_of_the_tests_is_there(name: str) -> None:
    if name in NOT_RUN:
        pytest.skip(f"{FOLDER} has no tests/{name.replace('.', '/')}.py, which was not run")
