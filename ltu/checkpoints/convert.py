"""Makes a checkpoint folder from released files or from pretrained components.

Each key of a file is placed, renamed, or dropped by a rule with a reason; a key that is left over
or missing is an error. Pickles are opened only with `weights_only=True`. Of a language model that
is not copied, only the embeddings are read, to initialize the projection.
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    FEATURE_EXTRACTOR_MAPPING,
    AutoConfig,
    AutoModel,
    LlamaConfig,
    PreTrainedConfig,
)

from ltu.checkpoints.original_checkpoints import (
    CAV_MAE_KEYS,
    FOLDER_KEYS,
    ORIGINAL_KEYS,
    PREFIX,
    KeyRule,
    check_audio_encoder,
    load_state,
    rename_keys,
)
from ltu.checkpoints.save_checkpoint import (
    find_weights,
    is_llm,
    merge,
    served_name,
    to_original,
    write_folder,
    write_merged_llm,
)
from ltu.checkpoints.wrap_audio_encoder import wrap_audio_encoder
from ltu.files import read_json_object
from ltu.models.configuration_audio_encoder_wrapper import MAX_CHUNK_SECONDS
from ltu.models.configuration_ltu import CavMaeConfig, LtuConfig, open_model_config
from ltu.models.feature_extraction_ltu import ChunkedFeatureExtractor
from ltu.models.finite_weights import check_finite
from ltu.models.locate_checkpoint import find_checkpoint, hash_model, sha256_of_weights
from ltu.models.modeling_ltu import LtuMultiModalProjector, build_on_meta
from ltu.models.processing_ltu import LtuProcessor
from ltu.models.prompt_template import load_prompt_template

# Names of the input embeddings in the files of language models.
EMBEDDINGS = (
    "model.embed_tokens",
    "gpt_neox.embed_in",
    "transformer.wte",
    "wte",
    "model.language_model.embed_tokens",
)
MIN_CHUNK_SECONDS = 0.1
WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
HEAD_WIDTH = 64  # Channels of an attention head, in all ViTs of the family of CAV-MAE.
INITIALIZER_RANGE = 0.02  # The usual standard deviation of embeddings, if no file shows it.


def lora_settings(state: dict[str, Tensor], alpha: int, dropout: float) -> dict | None:
    """Return the settings of the LoRA in `state`, or None if it has none.

    Rank and targets follow from the keys and shapes. Alpha and dropout are in no file (the original
    uses 16 and 0.05).

    Raises:
        ValueError: the layers have several ranks.
    """
    ranks = set()
    targets = set()
    for key, tensor in state.items():
        if ".lora_A." in key:
            ranks.add(tensor.shape[0])
            targets.add(key.split(".lora_A.")[0].split(".")[-1])
    if not ranks:
        return None
    if len(ranks) > 1:
        raise ValueError(f"LoRA of several ranks in one file: {sorted(ranks)}.")
    return {
        "r": ranks.pop(),
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(targets),
    }


def cav_mae_config(state: dict[str, Tensor]) -> CavMaeConfig:
    """Return the config of a CAV-MAE: width and depth as the shapes of its tensors.

    The number of heads is in no tensor: as in all ViTs of this family, each has 64 channels.
    """
    width = state["audio_tower.pos_embed_a"].shape[-1]
    blocks = {key.split(".attn.")[0] for key in state if ".attn.qkv.weight" in key}
    intermediate_size = state["audio_tower.blocks_a.0.mlp.fc1.weight"].shape[0]
    return CavMaeConfig(
        hidden_size=width,
        num_hidden_layers=len(blocks),
        num_attention_heads=width // HEAD_WIDTH,
        intermediate_size=intermediate_size,
    )


@dataclass(frozen=True)
class EncoderSettings:
    """How an audio encoder of transformers is used; see `wrap_audio_encoder`. None: the default.

    Attributes:
        num_audio_tokens: audio tokens of a chunk.
        chunk_seconds: length of a chunk.
        encoder_layers: "last", "mean", or the number of a layer.
    """

    num_audio_tokens: int | None = None
    chunk_seconds: float | None = None
    encoder_layers: str | None = None

    def given(self) -> list[str]:
        """Return the flags that are given."""
        return [f"--{name}" for name, value in vars(self).items() if value is not None]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `wrap_audio_encoder` that are given.

        Raises:
            ValueError: one of them is impossible.
        """
        if self.num_audio_tokens is not None and self.num_audio_tokens < 1:
            raise ValueError(f"--num_audio_tokens {self.num_audio_tokens}: it must be at least 1.")
        seconds = self.chunk_seconds
        if seconds is not None and not MIN_CHUNK_SECONDS <= seconds <= MAX_CHUNK_SECONDS:
            raise ValueError(
                f"--chunk_seconds {seconds:g}: it must be from {MIN_CHUNK_SECONDS:g} to "
                f"{MAX_CHUNK_SECONDS:g}."
            )
        layer: int | str | None = self.encoder_layers
        if layer not in (None, "last", "mean"):
            try:
                layer = int(layer)
            except ValueError as error:
                raise ValueError(
                    f"--encoder_layers {layer}: it must be last, mean, or the number of a layer."
                ) from error
        values = {
            "num_audio_tokens": self.num_audio_tokens,
            "chunk_seconds": seconds,
            "hidden_layer": layer,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class AudioEncoderParts:
    """An audio encoder for a new checkpoint.

    Attributes:
        config: of the audio encoder.
        state: its tensors by key, those that the checkpoint will hold.
        dropped: the keys that were dropped, each with the reason.
        extractor_settings: arguments of its feature extractor.
    """

    config: PreTrainedConfig
    state: dict[str, Tensor]
    dropped: dict[str, str] = field(default_factory=dict)
    extractor_settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class LtuConverter:
    """Makes checkpoint folders of LTU; subclasses override what differs in other models.

    The fields of a subclass are settings of its audio encoder.
    """

    config_class: ClassVar[type[LtuConfig]] = LtuConfig
    processor_class: ClassVar[type[LtuProcessor]] = LtuProcessor
    audio_encoder_keys: ClassVar[list[KeyRule]] = CAV_MAE_KEYS
    takes_other_encoders: ClassVar[bool] = True  # Whether the input may be that of any encoder.

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        """Add a flag for each field, of the same name."""

    def make_audio_config(self, state: dict[str, Tensor]) -> PreTrainedConfig:
        """Return the config of the audio encoder with the tensors `state`.

        If `state` is empty, return that of a random audio encoder.
        """
        return cav_mae_config(state) if state else CavMaeConfig()

    def extractor_settings(self, is_original: bool) -> dict:
        """Return settings of the feature extractor, besides its sizes.

        Args:
            is_original: whether they are for a checkpoint of the original.
        """
        return {}

    def convert_original(
        self,
        checkpoint: str | Path,
        llm: str | Path,
        output_dir: str | Path,
        lora_alpha: int = 16,
        lora_dropout: float = 0.05,
        llm_dtype: str | None = None,
    ) -> None:
        """Write a checkpoint folder from files of the original, and print what was dropped.

        Args:
            checkpoint: a file with the trainable parameters or a whole model, or a folder.
            llm: the language model, a folder or hub id.
            output_dir: the folder to write.
            lora_alpha, lora_dropout: settings of LoRA, which the files lack.
            llm_dtype: of the language model, if the files contain it.

        Raises:
            ValueError: a file cannot be converted or does not fit the model, or the arguments
                contradict it.
            FileNotFoundError: a file or folder is not there.
        """
        file = load_state(checkpoint)
        state, dropped = rename_keys(file, ORIGINAL_KEYS, (PREFIX,), checkpoint)
        check_audio_encoder(state, self.config_class.model_type, checkpoint)
        settings = {
            "text_config": open_model_config(llm),
            "audio_config": self.make_audio_config(state),
            "lora": lora_settings(state, lora_alpha, lora_dropout),
        }
        # A language model that was trained is in the file, and the folder then contains it. Else
        # the folder names the language model.
        if not any(map(is_llm, state)):
            if llm_dtype:
                raise ValueError(
                    f"{checkpoint} contains no language model; --llm_dtype does not apply."
                )
            settings |= _name_language_model(llm)
        config = self.config_class(**settings)
        extractor_settings = self.extractor_settings(is_original=True)
        processor = self.processor_class.from_config(config, llm, **extractor_settings)
        record = {
            "stage": "converted",
            "parent": _provenance(checkpoint),
            "dropped_keys": dropped,
        }
        placed = write_folder(output_dir, config, state, processor, record, llm_dtype)
        report(output_dir, placed, dropped)

    def make_initial_checkpoint(
        self,
        llm: str | Path,
        output_dir: str | Path,
        audio_encoder: str | Path | None = None,
        prompt_template: str = "alpaca_short",
        encoder_settings: EncoderSettings = EncoderSettings(),
    ) -> None:
        """Write the checkpoint folder from which stage 1 starts.

        Args:
            llm: the language model, a folder or hub id.
            output_dir: the folder to write.
            audio_encoder: as `load_audio_encoder` takes it.
            prompt_template: "alpaca_short", a JSON file, or "chat".
            encoder_settings: of an audio encoder of transformers.

        Raises: as `convert_original`.
        """
        text_config = open_model_config(llm)
        encoder = self.load_audio_encoder(audio_encoder, encoder_settings)
        config = self.config_class(
            text_config=text_config,
            audio_config=encoder.config,
            prompt_template=load_prompt_template(prompt_template, llm),
            **_name_language_model(llm),
        )
        state = init_projector(config, llm) | encoder.state
        extractor_settings = self.extractor_settings(is_original=False)
        extractor_settings |= encoder.extractor_settings
        processor = self.processor_class.from_config(config, llm, **extractor_settings)
        parent = None if audio_encoder is None else _provenance(audio_encoder)
        record = {"stage": "init", "parent": parent, "dropped_keys": encoder.dropped}
        placed = write_folder(output_dir, config, state, processor, record, None)
        report(output_dir, placed, encoder.dropped)

    def load_audio_encoder(
        self, path: str | Path | None, settings: EncoderSettings = EncoderSettings()
    ) -> AudioEncoderParts:
        """Load an audio encoder.

        Args:
            path: a `.pth` file; one of our folders of an audio encoder; a released folder of the
                original (of which the projection is loaded too); or a folder or hub id of an audio
                model of transformers, which the checkpoint then names. None: the audio encoder is
                random.
            settings: of an audio model of transformers. CAV-MAE and YAMNet take the number of audio
                tokens, too.

        Raises:
            ValueError: a key is unknown, or the file contains no audio encoder or that of the other
                model, or cannot be opened; or `settings` are given for another kind.
        """
        if path is not None and self._is_transformers_model(path):
            return self._wrap(path, settings)
        encoder = self._load_built_in(path)
        if settings.given():
            self._set_num_tokens(encoder.config, settings)
        return encoder

    def _load_built_in(self, path: str | Path | None) -> AudioEncoderParts:
        """Return CAV-MAE, YAMNet or TLTR; without a path, a random one.

        Raises:
            ValueError: as of `load_audio_encoder`.
        """
        if path is None:
            return self._random_audio_encoder()
        if not Path(path).is_dir():
            file = load_state(path)
            state, dropped = rename_keys(file, self.audio_encoder_keys, ("module.",), path)
        else:
            weights = Path(path) / "model.safetensors"
            if weights.is_file():
                config = AutoConfig.from_pretrained(path)
                extractor_class = FEATURE_EXTRACTOR_MAPPING.get(type(config), object)
                if issubclass(extractor_class, ChunkedFeatureExtractor):
                    state = _add_prefix("audio_tower", load_state(weights))
                    return AudioEncoderParts(config, state)
            state, dropped = rename_keys(load_state(path), FOLDER_KEYS, (), path)
        check_audio_encoder(state, self.config_class.model_type, path)
        return AudioEncoderParts(self.make_audio_config(state), state, dropped)

    def _is_transformers_model(self, path: str | Path) -> bool:
        """Return whether a path is that of a model of transformers, and none of our encoders."""
        name = str(path)
        if not Path(path).is_dir():
            is_local = Path(path).exists() or name.startswith((".", "/", "~"))
            is_file_name = Path(path).suffix in WEIGHT_SUFFIXES
            return name.count("/") == 1 and not is_local and not is_file_name
        if not (Path(path) / "config.json").is_file():
            return False
        model_type = read_json_object(Path(path) / "config.json").get("model_type")
        if not isinstance(model_type, str):
            return False
        if model_type not in CONFIG_MAPPING:
            return True  # Of another version of transformers, or with code of its own.
        config_class = CONFIG_MAPPING[model_type]
        # A released folder of the original is that of a Llama with an audio encoder in it.
        if config_class is LlamaConfig or issubclass(config_class, LtuConfig):
            return False
        extractor_class = FEATURE_EXTRACTOR_MAPPING.get(config_class, object)
        return not issubclass(extractor_class, ChunkedFeatureExtractor)

    def _wrap(self, path: str | Path, settings: EncoderSettings) -> AudioEncoderParts:
        """Return an audio encoder of transformers; the checkpoint names its weights.

        Raises:
            ValueError: this kind of model takes no other audio encoder, or the encoder cannot be
                used with these settings.
        """
        if not self.takes_other_encoders:
            raise ValueError(
                f"{path}: the audio encoder of {self.config_class.model_type} takes the layers of "
                "Whisper and no other input. Use: python -m ltu.convert_checkpoint --init"
            )
        if Path(path).is_dir():
            path = Path(path).resolve()
        wrapped = wrap_audio_encoder(path, **settings.arguments())
        return AudioEncoderParts(
            wrapped.config, state={}, extractor_settings=wrapped.extractor_settings
        )

    def _set_num_tokens(self, config: PreTrainedConfig, settings: EncoderSettings) -> None:
        """Set the number of audio tokens of a built-in encoder.

        Raises:
            ValueError: its time steps cannot be divided among so many, or other settings are given.
        """
        others = [flag for flag in settings.given() if flag != "--num_audio_tokens"]
        if others or not hasattr(config, "time_pooling"):
            raise ValueError(
                f"{', '.join(others or settings.given())}: only for an --audio_encoder of "
                "transformers, such as the folder or hub id of a Whisper. The built-in encoders "
                "have their own sizes."
            )
        num_tokens = settings.arguments()["num_audio_tokens"]
        if config.num_time_steps % num_tokens:
            raise ValueError(
                f"--num_audio_tokens {num_tokens}: this {config.model_type} has "
                f"{config.num_time_steps} time steps. Give a number that divides it."
            )
        config.time_pooling = config.num_time_steps // num_tokens

    def _random_audio_encoder(self) -> AudioEncoderParts:
        print(
            "WARNING: no --audio_encoder: the audio encoder is RANDOM. Its embeddings mean nothing "
            "until it has been trained on a lot of audio.",
            file=sys.stderr,
        )
        config = self.make_audio_config({})
        state = _add_prefix("audio_tower", AutoModel.from_config(config).state_dict())
        return AudioEncoderParts(config, state)

    def export_original(self, model: str | Path, file: str | Path) -> None:
        """Write a checkpoint folder as a file of the original, and print what was dropped."""
        folder, config = self._find(model)
        placed, dropped = to_original(config, folder, Path(file))
        report(file, placed, dropped)

    def merge(
        self,
        model: str | Path,
        output_dir: str | Path,
        llm: str | Path | None = None,
        llm_dtype: str | None = None,
    ) -> None:
        """Write a checkpoint folder as a self-contained one, with LoRA merged in."""
        folder, config, processor = self._open(model)
        placed, dropped = merge(config, folder, output_dir, processor, llm, llm_dtype)
        report(output_dir, placed, dropped)

    def merge_llm(
        self,
        model: str | Path,
        output_dir: str | Path,
        llm: str | Path | None = None,
        llm_dtype: str | None = None,
    ) -> None:
        """Write the language model of a checkpoint folder, LoRA merged in, as a stock folder."""
        folder, config, processor = self._open(model)
        placed, dropped = write_merged_llm(config, folder, output_dir, processor, llm, llm_dtype)
        report(output_dir, placed, dropped)
        name = served_name(sha256_of_weights(folder))
        print(
            f"Serve it with: vllm serve {output_dir} --enable-prompt-embeds "
            f"--served-model-name {name}"
        )

    def _open(self, model: str | Path) -> tuple[Path, PreTrainedConfig, LtuProcessor]:
        """Return a checkpoint folder, its config and its processor. Raises as `_find`."""
        folder, config = self._find(model)
        return folder, config, self.processor_class.from_pretrained(folder)

    def _find(self, model: str | Path) -> tuple[Path, PreTrainedConfig]:
        """Return a checkpoint folder and its config.

        Raises:
            ValueError: it is a checkpoint of another model.
        """
        folder = find_checkpoint(model)
        config = AutoConfig.from_pretrained(folder)
        package = config.model_type
        if package != self.config_class.model_type:
            raise ValueError(
                f"{folder} is a checkpoint of {package}. Use: "
                f"python -m {package}.convert_checkpoint"
            )
        return folder, config


# By the `model_type` of the config. ltu_as adds its own.
CONVERTERS: dict[str, type[LtuConverter]] = {"ltu": LtuConverter}


def _name_language_model(llm: str | Path) -> dict[str, str]:
    """Return the fields of the config that name the language model, and identify its files."""
    return {"language_model": str(llm), "language_model_sha256": hash_model(llm)}


def _provenance(path: str | Path) -> dict[str, str]:
    """Return the name of a file, folder or hub id, and the hash of its weights."""
    if Path(path).exists():
        return {"name": Path(path).name, "sha256": sha256_of_weights(path)}
    return {"name": str(path), "sha256": sha256_of_weights(find_weights(path))}


def _add_prefix(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": value for key, value in state.items()}


def init_projector(config: LtuConfig, llm: str | Path) -> dict[str, Tensor]:
    """Return a random projection whose audio embeddings are about as long as token embeddings.

    Stage 1 then starts at the right scale.
    """
    projector = LtuMultiModalProjector(config)
    # LayerNorm gives each input channel unit variance.
    std = _embedding_std(llm) / config.audio_config.hidden_size**0.5
    # Gemma multiplies its token embeddings by sqrt(hidden), but not the audio embeddings that
    # replace some of them.
    std *= getattr(build_on_meta(config).get_input_embeddings(), "scalar_embed_scale", 1.0)
    torch.nn.init.normal_(projector.linear.weight, std=std)
    torch.nn.init.zeros_(projector.linear.bias)
    return _add_prefix("multi_modal_projector", projector.state_dict())


def _embedding_std(llm: str | Path) -> float:
    """Return the standard deviation of the token embeddings of a language model.

    Raises:
        ValueError: an embedding is NaN or infinite.
    """
    state = load_state(find_weights(llm))
    for name in EMBEDDINGS:
        key = f"{name}.weight"
        if key in state:
            check_finite({key: state[key]}, str(llm))
            return float(state[key].float().std())
    return INITIALIZER_RANGE


def report(path: str | Path, placed: int, dropped: dict[str, str]) -> None:
    """Print how many keys were written to `path`, and how many were dropped for which reason."""
    print(f"{path}: {placed} keys placed, {len(dropped)} dropped, none missing, none left over.")
    for reason, count in sorted(Counter(dropped.values()).items()):
        print(f"  dropped, {reason}: {count} keys")
