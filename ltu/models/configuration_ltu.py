"""Defines the configs of the model and of its audio encoders.

`LtuConfig` holds two whole configs: that of the audio encoder (`audio_config`) and that of the
language model (`text_config`). All other sizes follow from these two. The Auto classes find the
class of the audio encoder by its `model_type`, so a new audio encoder, such as TLTR of LTU-AS,
registers itself and needs no change here.

`audio_token_id` is the width of the logits: one past the last token that the language model can
generate, never a token of the tokenizer.
"""

import copy
import os
from math import ceil
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from ltu.files import read_json_object
from ltu.models.config_checks import (
    LtuFields,
    check_fields,
    check_numbers,
    check_sizes,
    refuse_malformed,
    show,
)
from ltu.models.locate_checkpoint import check_files, relative_path_of

IGNORED = -100  # Labels with this value carry no loss (torch.nn.functional.cross_entropy).

# The released checkpoints were trained on these strings, to the character.
ALPACA_SHORT = {
    "name": "alpaca_short",
    "prompt_no_input": "### Instruction:\n{instruction}\n\n### Response:\n",
    "prompt_input": "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class CavMaeConfig(PreTrainedConfig):
    """The audio branch of a fine-tuned CAV-MAE, an audio spectrogram transformer: LTU's encoder.

    Args:
        num_mel_bins, num_frames: size of the filterbank; one frame is 10 ms, so 1024 frames are
            10.24 s.
        patch_size: side of a square patch, in bins and frames; patches do not overlap.
        num_hidden_layers: all transformer blocks; CAV-MAE shares the last one between audio and
            image.
        time_pooling: neighbouring time steps that are averaged into one audio token, after the mean
            over frequency.
        feature_divisor: the features are divided by it before a LayerNorm without weights. It has
            an effect only through the eps of that LayerNorm.
    """

    model_type = "cavmae"

    def __init__(
        self,
        num_mel_bins: int = 128,
        num_frames: int = 1024,
        patch_size: int = 16,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        time_pooling: int = 2,
        feature_divisor: float = 50.0,
        **kwargs: Any,
    ):
        self.num_mel_bins = num_mel_bins
        self.num_frames = num_frames
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.time_pooling = time_pooling
        self.feature_divisor = feature_divisor
        check_sizes(self)
        if num_mel_bins % patch_size or num_frames % (patch_size * time_pooling):
            raise ValueError(
                f"A filterbank of {num_frames} frames x {num_mel_bins} bins does not divide into "
                f"patches of {patch_size} and groups of {time_pooling} time steps. Choose "
                f"num_frames as a multiple of {patch_size * time_pooling} and num_mel_bins as a "
                f"multiple of {patch_size}."
            )
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size {hidden_size} does not divide by num_attention_heads "
                f"{num_attention_heads}. Choose a divisor of {hidden_size}."
            )
        super().__init__(**kwargs)

    @property
    def num_time_steps(self) -> int:
        """Time steps of the patches."""
        return self.num_frames // self.patch_size

    @property
    def num_audio_tokens(self) -> int:
        return self.num_time_steps // self.time_pooling

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """The shape of the features of one clip."""
        return self.num_frames, self.num_mel_bins

    @property
    def extractor_settings(self) -> dict[str, Any]:
        """Arguments of the feature extractor that follow from the audio encoder."""
        return {"num_mel_bins": self.num_mel_bins, "num_frames": self.num_frames}


class YamnetConfig(PreTrainedConfig):
    """YAMNet, a MobileNet trained on AudioSet: the small audio encoder of the quickstart.

    Args:
        num_mel_bins, num_frames: size of the log-mel spectrogram; one frame is 10 ms.
        hidden_size: channels of the last convolution.
        time_stride: frames per time step, the product of the strides of the convolutions.
        time_pooling: neighbouring time steps that are averaged into one audio token.
        feature_divisor: see `CavMaeConfig`; YAMNet needs none.
    """

    model_type = "yamnet"

    def __init__(
        self,
        num_mel_bins: int = 64,
        num_frames: int = 1024,
        hidden_size: int = 1024,
        num_classes: int = 521,
        time_stride: int = 32,
        time_pooling: int = 1,
        initializer_range: float = 0.02,
        feature_divisor: float = 1.0,
        **kwargs: Any,
    ):
        self.num_mel_bins = num_mel_bins
        self.num_frames = num_frames
        self.hidden_size = hidden_size
        self.num_classes = num_classes
        self.time_stride = time_stride
        self.time_pooling = time_pooling
        self.initializer_range = initializer_range
        self.feature_divisor = feature_divisor
        check_sizes(self)
        if self.num_time_steps % time_pooling:
            raise ValueError(
                f"time_pooling is {time_pooling}, which does not divide the {self.num_time_steps} "
                "time steps of YAMNet's output."
            )
        super().__init__(**kwargs)

    @property
    def num_time_steps(self) -> int:
        """Time steps of the output of the convolutions."""
        return ceil(self.num_frames / self.time_stride)

    @property
    def num_audio_tokens(self) -> int:
        return self.num_time_steps // self.time_pooling

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """The shape of the features of one clip."""
        return self.num_frames, self.num_mel_bins

    @property
    def extractor_settings(self) -> dict[str, Any]:
        """Arguments of the feature extractor that follow from the audio encoder."""
        return {"num_mel_bins": self.num_mel_bins, "num_frames": self.num_frames}


class LtuConfig(PreTrainedConfig):
    """Config of audio encoder, projector and causal language model.

    Args:
        audio_config: config of the audio encoder, or its dict; `model_type` chooses the class.
        text_config: whole config of the language model, or its dict: any Hugging Face causal LM.
        language_model: hub id or folder of the frozen weights of the language model. `config.json`
            names a folder relative to the checkpoint. None if the checkpoint itself holds the
            language model.
        language_model_sha256: hash of that model's `config.json` and weight index; a model with
            another hash is not loaded.
        lora: arguments of peft's `LoraConfig`: `{"r", "lora_alpha", "lora_dropout",
            "target_modules"}`, or None if the language model has no LoRA (stage 1). The whole
            `LoraConfig.to_dict()` is not stored, because its keys differ between versions of peft.
        encoder_lora: the same for the audio encoder, or None if it has no LoRA.
        prompt_template: `{"name", "prompt_no_input", "prompt_input"}`, and `"chat_template"` if
            that of the language model is used; by default the template of the released checkpoints.
        projector_layer_norm_eps: eps of the LayerNorm in front of the projector.
    """

    model_type = "ltu"
    sub_configs = {"audio_config": AutoConfig, "text_config": AutoConfig}
    default_audio_model_type = "cavmae"

    def __init__(
        self,
        audio_config: PreTrainedConfig | dict | None = None,
        text_config: PreTrainedConfig | dict | None = None,
        language_model: str | None = None,
        language_model_sha256: str | None = None,
        lora: dict | None = None,
        encoder_lora: dict | None = None,
        prompt_template: dict | None = None,
        projector_layer_norm_eps: float = 1e-5,
        **kwargs: Any,
    ):
        fields = {
            "language_model": language_model,
            "language_model_sha256": language_model_sha256,
            "lora": lora,
            "encoder_lora": encoder_lora,
            "prompt_template": prompt_template,
        }
        fields |= {name: kwargs.get(name) for name in TOKENS}
        check_fields(LtuFields, fields, f"The config of {self.model_type}")
        self.audio_config = as_config(audio_config, self.default_audio_model_type)
        self.text_config = as_config(text_config, "llama")
        if not getattr(self.text_config, "vocab_size", None):
            raise ValueError(
                f"{self.text_config.model_type} is no causal language model, because its config "
                "has no vocab_size. Give a model of text only."
            )
        self.language_model = language_model
        self.language_model_sha256 = language_model_sha256
        self.lora = lora
        self.encoder_lora = encoder_lora
        self.prompt_template = dict(prompt_template or ALPACA_SHORT)
        self.projector_layer_norm_eps = projector_layer_norm_eps
        # Both values are derived, and written to config.json for readers. A stored value that
        # contradicts its source is an error.
        derived = {
            "num_audio_tokens": self.audio_config.num_audio_tokens,
            "audio_token_id": self.text_config.vocab_size,
        }
        for name, value in derived.items():
            stored = kwargs.pop(name, value)
            if stored != value:
                raise ValueError(
                    f"{name} is {stored} in the config, but {value} follows from audio_config and "
                    "text_config. Remove it from the config."
                )
            setattr(self, name, value)
        for name in TOKENS:
            kwargs.setdefault(name, getattr(self.text_config, name, None))
        # The language model ties its own embeddings; the model around it owns none.
        kwargs["tie_word_embeddings"] = False
        check_sizes(self)
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a config of the content of `config.json`, as the stock method does.

        Raises:
            ValueError: a value has a wrong type or size.
        """
        folder = kwargs.get("name_or_path") or config_dict.get("_name_or_path")
        with refuse_malformed(f"{folder}: config.json" if folder else "The config"):
            return super().from_dict(config_dict, **kwargs)

    @property
    def named_encoder(self) -> str | None:
        """Hub id or folder of an audio encoder that the checkpoint names; None if it holds it."""
        return getattr(self.audio_config, "encoder", None)

    @property
    def encoder_sha256(self) -> str | None:
        """Hash of an audio encoder that the checkpoint names."""
        return getattr(self.audio_config, "encoder_sha256", None)

    @property
    def num_positions(self) -> int:
        """Tokens that the language model has positions for; 2**20 if its config has no limit."""
        return getattr(self.text_config, "max_position_embeddings", None) or 2**20

    def to_dict(self) -> dict[str, Any]:
        """Return the config as a dict.

        It lacks how the language model was quantized when it was opened, which is a setting of a
        run: the same checkpoint is opened with and without quantization. It also lacks the folder
        of this machine from which the language model was opened, because a config is uploaded.
        """
        content = super().to_dict()
        for name in ("quantization_config", "_name_or_path"):
            content["text_config"].pop(name, None)
        content.pop("auto_map", None)  # A folder without the code must not name it.
        if content["encoder_lora"] is None:
            del content["encoder_lora"]  # Folders of older versions lack it too.
        return content

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write `config.json`.

        The paths of the folders of the language model and the audio encoder are written relative to
        it, so that they can be moved together.
        """
        named = {"language_model": self, "encoder": self.audio_config}
        paths = {field: getattr(config, field, None) for field, config in named.items()}
        try:
            for field, config in named.items():
                if paths[field] is not None and Path(paths[field]).is_dir():
                    setattr(config, field, relative_path_of(paths[field], save_directory))
            super().save_pretrained(save_directory, **kwargs)
        finally:
            for field, config in named.items():
                if paths[field] is not None:
                    setattr(config, field, paths[field])

    def find_language_model(self, folder: str | os.PathLike) -> str:
        """Return the hub id or the absolute folder of the language model.

        Args:
            folder: of the checkpoint, to which the path of the language model is relative.
        """
        return find_model(self.language_model, folder)


def find_model(name: str, folder: str | os.PathLike) -> str:
    """Return the hub id or the absolute folder of a model that a checkpoint names.

    Args:
        name: as in the config of the checkpoint.
        folder: of the checkpoint, to which a path that begins with a dot is relative.
    """
    return str((Path(folder) / name).resolve()) if name.startswith(".") else name


def open_model_config(name: str | os.PathLike, **hub_kwargs: Any) -> PreTrainedConfig:
    """Return the config of a language model or audio model in a folder or on the hub.

    Args:
        hub_kwargs: arguments of `AutoConfig.from_pretrained`, such as `token`.

    Raises:
        OSError: there is no such model.
        ValueError: a file of its folder is damaged, or a value in the config has a wrong type or
            size.
    """
    if Path(name).is_dir():
        check_files(Path(name))
        path = Path(name, "config.json")
        check_numbers(read_json_object(path), str(path))
    hub_kwargs = {
        "trust_remote_code": False
    } | hub_kwargs  # By default, transformers asks on stdin.
    try:
        with refuse_malformed(f"{name}: config.json"):
            config = AutoConfig.from_pretrained(name, **hub_kwargs)
            check_sizes(config)
    except OSError as error:
        if str(name) in str(error):
            raise
        raise OSError(f"{name}: {error}") from error
    return config


def as_config(config: PreTrainedConfig | dict | None, default_model_type: str) -> PreTrainedConfig:
    """Return a copy of a config, or the config that a dict describes.

    Args:
        default_model_type: of a dict without `model_type`.

    Raises:
        ValueError: the model type is not known, or a value has a wrong type or size.
    """
    if isinstance(config, PreTrainedConfig):
        # Copy the config: transformers writes settings such as the attention implementation from
        # the outer config into the inner one, which may be that of a language model in use.
        return copy.deepcopy(config)
    if not isinstance(config, dict | None):
        raise ValueError(f"audio_config and text_config are objects, not {show(config)}.")
    config = dict(config or {})
    model_type = config.pop("model_type", default_model_type)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"model_type is {show(model_type)}, which is not known here. A type of LTU-AS is known "
            "to the commands of ltu_as (in Python: import ltu_as)."
        )
    subject = f"The config of {model_type}"
    check_numbers(config, subject)  # A config class may divide by them.
    with refuse_malformed(subject):
        made = AutoConfig.for_model(model_type, **config)
        check_sizes(made)
    return made


AutoConfig.register("cavmae", CavMaeConfig)
AutoConfig.register("yamnet", YamnetConfig)
AutoConfig.register("ltu", LtuConfig)
