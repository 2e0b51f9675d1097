"""Every number of the architecture, once.

Notable:
- `LtuConfig` holds two whole configs: the ear (`audio_config`) and the language model (`text_config`); everything else
  follows from them.
- The ear is found by `model_type` through the Auto classes, so a new ear (LTU-AS's TLTR) registers itself and needs no
  change here.
- `audio_token_id` is the width of the logits: one past the last token that the language model can write, never a token
  of the tokenizer.
"""

import copy
import os
from math import ceil
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ltu.models.checkpoint_folder import relative_path_of

# The released checkpoints were trained on these strings, to the character.
ALPACA_SHORT = {
    "name": "alpaca_short",
    "prompt_no_input": "### Instruction:\n{instruction}\n\n### Response:\n",
    "prompt_input": "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
}


class CavMaeConfig(PreTrainedConfig):
    """The audio branch of a fine-tuned CAV-MAE (an audio spectrogram transformer), LTU's ear.

    Args:
        num_mel_bins, num_frames: size of the filterbank; one frame is 10 ms, so 1024 frames are 10.24 s.
        patch_size: side of a square patch, in bins and frames; patches do not overlap.
        num_hidden_layers: all transformer blocks; the last is the one that CAV-MAE shares between sound and image.
        time_pooling: neighbouring time steps averaged into one audio token, after the mean over frequency.
        feature_divisor: the features are divided by it before a LayerNorm without weights. It matters through that
            LayerNorm's eps only.
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
        if num_mel_bins % patch_size or num_frames % (patch_size * time_pooling):
            raise ValueError(
                f"A filterbank of {num_frames} frames x {num_mel_bins} bins does not divide into patches of "
                f"{patch_size} "
                f"and groups of {time_pooling} time steps. Choose num_frames as a multiple of "
                f"{patch_size * time_pooling} "
                f"and num_mel_bins as a multiple of {patch_size}."
            )
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
        super().__init__(**kwargs)

    @property
    def num_audio_tokens(self) -> int:
        return self.num_frames // self.patch_size // self.time_pooling


class YamnetConfig(PreTrainedConfig):
    """YAMNet, a MobileNet trained on AudioSet: the small ear that the quickstart uses.

    Args:
        num_mel_bins, num_frames: size of the log-mel picture; one frame is 10 ms.
        hidden_size: channels of the last convolution.
        time_stride: frames per audio token, the product of the strides of its convolutions.
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
        initializer_range: float = 0.02,
        feature_divisor: float = 1.0,
        **kwargs: Any,
    ):
        self.num_mel_bins = num_mel_bins
        self.num_frames = num_frames
        self.hidden_size = hidden_size
        self.num_classes = num_classes
        self.time_stride = time_stride
        self.initializer_range = initializer_range
        self.feature_divisor = feature_divisor
        super().__init__(**kwargs)

    @property
    def num_audio_tokens(self) -> int:
        return ceil(self.num_frames / self.time_stride)


class LtuConfig(PreTrainedConfig):
    """An ear, a projection and a causal language model.

    Args:
        audio_config: config of the ear, or its dict; `model_type` chooses the class.
        text_config: config of the language model, or its dict, whole: any Hugging Face causal LM.
        language_model: where the frozen weights of the language model lie: a hub id, or a folder. On disk the folder is
            written relative to the checkpoint. None: the checkpoint itself holds the language model.
        language_model_sha256: hash of that model's `config.json` and weight index; another hash refuses to load.
        lora: `{"r", "alpha", "dropout", "target_modules"}`, or None where the language model has no adapter (stage 1).
        prompt_template: `{"name", "prompt_no_input", "prompt_input"}`, and `"chat_template"` where the language model's
            own is used; the default is what the released checkpoints know.
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
        prompt_template: dict | None = None,
        projector_layer_norm_eps: float = 1e-5,
        **kwargs: Any,
    ):
        self.audio_config = _as_config(audio_config, self.default_audio_model_type)
        self.text_config = _as_config(text_config, "llama")
        if not hasattr(self.text_config, "vocab_size"):
            raise ValueError(
                f"{self.text_config.model_type} is no causal language model; name one that is text alone."
            )
        self.language_model = language_model
        self.language_model_sha256 = language_model_sha256
        self.lora = lora
        self.prompt_template = dict(prompt_template or ALPACA_SHORT)
        self.projector_layer_norm_eps = projector_layer_norm_eps
        # Derived, yet written to config.json for readers. A stored value that contradicts its source is refused.
        derived = {
            "num_audio_tokens": self.audio_config.num_audio_tokens,
            "audio_token_id": self.text_config.vocab_size,
        }
        for name, value in derived.items():
            stored = kwargs.pop(name, value)
            if stored != value:
                raise ValueError(
                    f"{name} is {stored} in the config, but {value} follows from its parts. Remove it from the config."
                )
            setattr(self, name, value)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.text_config, name, None))
        kwargs["tie_word_embeddings"] = (
            False  # The language model ties its own; the wrapper owns no embedding.
        )
        super().__init__(**kwargs)

    @property
    def num_positions(self) -> int:
        """Tokens that the language model has positions for; a million where its config does not say."""
        return getattr(self.text_config, "max_position_embeddings", None) or 2**20

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write `config.json`, the folder of the language model relative to it, so that both can move together."""
        kept = self.language_model
        if kept is not None and Path(kept).is_dir():
            self.language_model = relative_path_of(kept, save_directory)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.language_model = kept

    def find_language_model(self, folder: str | os.PathLike) -> str:
        """Where the language model of the checkpoint in `folder` lies: its hub id, or its folder."""
        name = self.language_model
        return str((Path(folder) / name).resolve()) if name.startswith(".") else name


def _as_config(config: PreTrainedConfig | dict | None, default_model_type: str) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        # A copy: transformers writes settings such as the attention implementation from the outer
        # config into the inner one, which may be that of a language model in use.
        return copy.deepcopy(config)
    config = dict(config or {})
    return AutoConfig.for_model(config.pop("model_type", default_model_type), **config)


AutoConfig.register("cavmae", CavMaeConfig)
AutoConfig.register("yamnet", YamnetConfig)
AutoConfig.register("ltu", LtuConfig)
