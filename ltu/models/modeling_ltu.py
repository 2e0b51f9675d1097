"""Puts audio embeddings in front of the prompt of a causal language model.

The language model is any stock Hugging Face causal LM, into which peft injects LoRA. Nothing is
forked or patched.

A sequence is `[audio placeholders][padding][text]`. A placeholder is the token one past the
vocabulary. The model finds audio by this token and padding by the mask, so padding may be anywhere,
and many questions can share one audio prefix.

A checkpoint holds the trained weights, and the name and hash of its language model instead of a
copy, unless the language model was trained too. Audio encoder, projector and LoRA are fp32, in
memory and on disk. The frozen language model may be bf16 or quantized; autocast converts between
the two. A language model that is trained is fp32 too.

No checkpoint with NaN or infinite weights is written or opened.
"""

import copy
import logging
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import TransformersKwargs
from typing_extensions import Unpack

from ltu.models.config_checks import LIBRARY_ERRORS, refuse_malformed
from ltu.models.configuration_ltu import IGNORED, LtuConfig, find_model, open_model_config
from ltu.models.custom_code import CustomCodeMixin
from ltu.models.finite_weights import check_finite
from ltu.models.generation_ltu import LtuGenerationMixin
from ltu.models.locate_checkpoint import (
    WEIGHT_FILES,
    find_checkpoint,
    hash_model,
    weight_files,
)
from ltu.models.lora import find_parameters, find_targets, inject_lora, lora_layers, merge_lora
from ltu.models.model_card import CARD, add_model_card
from ltu.models.weight_headers import StoredTensor, read_headers

logger = logging.getLogger(__name__)

# The parameters that each plan trains, as prefixes of their names, or as an infix if it begins with
# a dot. The plans "proj" and "all" are named as in the original.
TRAINABLE_PLANS = {
    "proj": ("multi_modal_projector.",),
    "all": ("audio_tower.", "multi_modal_projector.", ".lora_"),
    "full": ("audio_tower.", "multi_modal_projector.", "language_model."),
}

# Auto classes that open a checkpoint folder: those of text models, of Qwen2-Audio, and of Audio
# Flamingo 3.
AUTO_CLASSES = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
)

# Arguments that `from_pretrained` passes to the hub.
HUB_ARGUMENTS = ("cache_dir", "revision", "token", "local_files_only", "force_download")
# Arguments that the Auto classes pass, and that `from_pretrained` ignores.
AUTO_ARGUMENTS = ("trust_remote_code", "adapter_kwargs", "code_revision")
# Arguments that `from_pretrained` passes to the language model.
LLM_ARGUMENTS = ("attn_implementation", "quantization_config", "max_memory", "offload_folder")


class LtuMultiModalProjector(nn.Module):
    """LayerNorm without weights, then one linear map into the width of the language model."""

    def __init__(self, config: LtuConfig):
        super().__init__()
        width = config.audio_config.hidden_size
        self.layer_norm = nn.LayerNorm(
            width, eps=config.projector_layer_norm_eps, elementwise_affine=False
        )
        self.linear = nn.Linear(width, config.text_config.hidden_size)

    def forward(self, audio_hidden: Tensor) -> Tensor:
        return self.linear(self.layer_norm(audio_hidden))  # (clips, tokens, hidden)


class LtuForConditionalGeneration(CustomCodeMixin, PreTrainedModel, LtuGenerationMixin):
    """Audio encoder (`audio_tower`), `multi_modal_projector` and causal `language_model`.

    Args:
        config: sizes of all three.
        language_model: a loaded causal LM. Without one it is built from `config.text_config` with
            random weights.
    """

    config_class = LtuConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    # The loss is a mean over the tokens of each micro-batch, averaged over accumulation steps. With
    # True, the Trainer would divide by the tokens of all micro-batches instead.
    accepts_loss_kwargs = False

    def __init__(self, config: LtuConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        self.checkpoint_folder: Path | None = None  # The folder that was opened.
        self.audio_tower = AutoModel.from_config(config.audio_config)
        self.multi_modal_projector = LtuMultiModalProjector(config)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        # Share one object, so that a change of the attention implementation or of the vocabulary
        # reaches both.
        config.text_config = self.language_model.config
        self.language_model.requires_grad_(False)
        if config.lora:
            inject_lora(self.language_model, config.lora)
        if config.encoder_lora:
            inject_lora(self.audio_tower, config.encoder_lora)
        self.post_init()

    def init_weights(self) -> None:
        """Do nothing: the parts initialise themselves, and a loaded language model is kept."""

    def add_lora(
        self,
        r: int,
        lora_alpha: int,
        lora_dropout: float,
        target_modules: list[str] | None = None,
    ) -> None:
        """Inject a new LoRA into the language model; its product is zero at first.

        Args:
            r, lora_alpha, lora_dropout: rank, scale and dropout, as in peft's `LoraConfig`.
            target_modules: names of the layers; by default, those that `find_targets` chooses.

        Raises:
            ValueError: the model has LoRA already, or no such layers.
        """
        if self.config.lora:
            raise ValueError(
                f"The model already has LoRA {self.config.lora}. Leave the --lora_* flags out to "
                "continue with it."
            )
        targets = find_targets(self.language_model, target_modules)
        self.config.lora = {
            "r": r,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "target_modules": targets,
        }
        inject_lora(self.language_model, self.config.lora)

    def add_encoder_lora(
        self, r: int, lora_alpha: int, lora_dropout: float, target_modules: list[str]
    ) -> None:
        """Inject a new LoRA into the audio encoder; its product is zero at first.

        Args, Raises: as of `add_lora`.
        """
        if self.config.encoder_lora:
            raise ValueError(
                f"The audio encoder already has LoRA {self.config.encoder_lora}. Leave "
                "--encoder_lora_target_modules out to continue with it."
            )
        flag = "--encoder_lora_target_modules"
        targets = find_targets(self.audio_tower, target_modules, flag)
        self.config.encoder_lora = {
            "r": r,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "target_modules": targets,
        }
        self.audio_tower.requires_grad_(True)
        used_before = self._find_used_in_audio_tower()
        inject_lora(self.audio_tower, self.config.encoder_lora)
        try:
            used = self._find_used_in_audio_tower()
        except LIBRARY_ERRORS as error:  # It needs more of a layer than its output.
            raise ValueError(
                f"The audio encoder does not run with LoRA on {targets} ({type(error).__name__}: "
                f"{error}). Name other layers: {flag}"
            ) from error
        self._check_encoder_lora(used_before, used)

    def _find_used_in_audio_tower(self) -> set[nn.Parameter]:
        """Return the parameters with `requires_grad` that the audio tokens depend on."""
        weight = self.multi_modal_projector.linear.weight
        features = weight.new_zeros(1, *self.config.audio_config.feature_shape)
        with torch.enable_grad():
            return find_parameters(self.audio_tower(features))

    def _check_encoder_lora(self, used_before: set[nn.Parameter], used: set[nn.Parameter]) -> None:
        """Check that LoRA can be merged, and that the audio tokens depend on it.

        It may also be in layers that the tokens do not depend on, such as later ones than the layer
        whose hidden states are used.

        Args:
            used_before: the parameters that the tokens depended on without LoRA.
            used: those that they depend on now.

        Raises:
            ValueError: one of the two does not hold.
        """
        hint = "Name other layers: --encoder_lora_target_modules"
        layers = lora_layers(self.audio_tower)
        for name, layer in layers.items():
            base_layer = layer.get_base_layer()
            base = set(base_layer.parameters())
            lora = set(layer.parameters()) - base
            is_parameter = "weight" in dict(base_layer.named_parameters(recurse=False))
            if getattr(base_layer, "groups", 1) > 1 or not is_parameter:
                raise ValueError(
                    f"LoRA on {name} could not be merged, because it is a convolution with groups "
                    f"or with weights that are computed. {hint}"
                )
            # Some attention layers of torch use the weights of a layer without calling the layer.
            if used_before & base and not used & lora:
                raise ValueError(
                    f"LoRA on {name} has no effect, because the audio encoder uses its weights "
                    f"without calling the layer. {hint}"
                )
        if not any(used & set(layer.parameters()) for layer in layers.values()):
            raise ValueError(
                f"LoRA on {', '.join(layers)} has no effect, because the audio tokens do not "
                f"depend on these layers. {hint}"
            )

    def merge_lora(self) -> None:
        """Add the product of LoRA to the weights of its model, and remove LoRA.

        The models that the config names lack this product, so a checkpoint holds them from now on.

        Raises:
            ValueError: LoRA is on a tied weight, or the language model is quantized or offloaded.
        """
        if self.config.lora is not None:
            self._check_not_quantized("LoRA cannot be merged into it")
            merge_lora(self.language_model)
            self.config.lora = None
            self._own_language_model()
        if self.config.encoder_lora is not None:
            merge_lora(self.audio_tower)
            self.config.encoder_lora = None
            self._own_audio_tower()

    def _check_not_quantized(self, consequence: str) -> None:
        if getattr(self.language_model, "is_quantized", False):
            raise ValueError(
                f"The language model is quantized: {consequence}. Open it without quantization."
            )

    def _own_language_model(self) -> None:
        """Let checkpoints hold the language model, instead of naming another copy of it."""
        self.config.language_model = None
        self.config.language_model_sha256 = None

    def _own_audio_tower(self) -> None:
        """Let checkpoints hold the audio encoder, if the config names another copy of it."""
        if hasattr(self.audio_tower, "own_weights"):
            self.audio_tower.own_weights()

    def set_trainable(self, plan: str, freeze_audio_tower: bool = False) -> None:
        """Freeze all parameters but those of a plan.

        Of an audio encoder with LoRA, LoRA alone is trained. An audio encoder whose own weights are
        trained is in the checkpoints from now on.

        Args:
            plan: "proj" (projector), "all" (audio encoder, projector and LoRA), or "full" (audio
                encoder, projector and language model, which checkpoints then hold).
            freeze_audio_tower: whether the audio encoder is frozen in any case.

        Raises:
            ValueError: the plan is "full", and the model has LoRA or is quantized.
        """
        if plan == "full":
            if self.config.lora is not None or self.config.encoder_lora is not None:
                raise ValueError("The plan 'full' trains no LoRA: call merge_lora() first.")
            self._check_not_quantized("its weights cannot be trained")
            self._own_language_model()
        patterns = TRAINABLE_PLANS[plan]
        prefixes = tuple(pattern for pattern in patterns if not pattern.startswith("."))
        infixes = [pattern for pattern in patterns if pattern.startswith(".")]
        fixed = getattr(self.audio_tower, "fixed_parameter_names", frozenset())
        for name, parameter in self.named_parameters():
            is_trainable = name.startswith(prefixes) or any(infix in name for infix in infixes)
            if name.startswith("audio_tower."):
                is_lora = ".lora_" in name
                is_frozen = freeze_audio_tower or name.removeprefix("audio_tower.") in fixed
                if self.config.encoder_lora is not None and not is_lora:
                    is_frozen = True
                is_trainable = is_trainable and not is_frozen
                if is_trainable and not is_lora:
                    self._own_audio_tower()
            parameter.requires_grad_(is_trainable)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count parameters as the stock method does, those of a quantized language model too.

        The stock method would count two weights of 4 bits as one, because only the language model
        knows that it is quantized.
        """
        parts = (self.audio_tower, self.multi_modal_projector)
        count = self.language_model.num_parameters(only_trainable, exclude_embeddings)
        for parameter in chain.from_iterable(part.parameters() for part in parts):
            if parameter.requires_grad or not only_trainable:
                count += parameter.numel()
        return count

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Run the stock method on the language model, and return its new embeddings.

        A checkpoint holds the language model from now on. The audio placeholder remains one past
        the vocabulary, so `config.audio_token_id` changes: make a new processor, with
        `LtuProcessor.from_config`.

        Raises:
            ValueError: the language model is quantized.
        """
        self._check_not_quantized("its embeddings cannot be resized")
        embeddings = self.language_model.resize_token_embeddings(*args, **kwargs)
        vocab_size = self.config.text_config.vocab_size
        if vocab_size != self.config.audio_token_id:
            self.config.audio_token_id = vocab_size
            self._own_language_model()
        return embeddings

    def get_audio_features(
        self, input_features: Tensor | None = None, audio_hidden_states: Tensor | None = None
    ) -> Tensor:
        """Return the audio embeddings (clips, num_audio_tokens, hidden) of clips.

        Args:
            input_features: (clips, frames, mel bins) spectrograms.
            audio_hidden_states: (clips, num_audio_tokens, audio hidden) of further clips, which are
                in front of those of `input_features`: outputs of the audio encoder, which then does
                not run for them.
        """
        weight = self.multi_modal_projector.linear.weight
        parts = []
        if audio_hidden_states is not None:
            parts.append(audio_hidden_states.to(weight.device))
        if input_features is not None:
            input_features = input_features.to(weight.device, weight.dtype)
            parts.append(self.audio_tower(input_features))  # (clips, tokens, audio hidden)
        audio_hidden = torch.cat(parts) if len(parts) > 1 else parts[0]
        audio_hidden = audio_hidden / self.config.audio_config.feature_divisor
        return self.multi_modal_projector(audio_hidden)  # (clips, tokens, hidden)

    def _embed(
        self,
        input_ids: Tensor,
        input_features: Tensor | None = None,
        audio_index: Tensor | None = None,
        audio_embeds: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        audio_hidden_states: Tensor | None = None,
    ) -> Tensor:
        """Return token embeddings, with audio embeddings at the placeholders.

        Arguments as in `forward`.

        Returns:
            (batch, length, hidden)
        """
        input_ids = input_ids.to(self.get_input_embeddings().weight.device)
        # `generate` has embedded the prompt already. Only the tokens after it are embedded here:
        # none at the first step, all generated ones at a later step without a cache.
        prompt_length = 0 if prompt_embeds is None else prompt_embeds.shape[1]
        if 0 < prompt_length <= input_ids.shape[1]:
            new_embeds = self.get_input_embeddings()(input_ids[:, prompt_length:])
            return torch.cat([prompt_embeds, new_embeds], dim=1)

        is_audio = input_ids == self.config.audio_token_id  # (batch, length)
        if audio_embeds is None:
            clips = [input_features, audio_hidden_states]
            tokens_per_clip = self.config.num_audio_tokens
        else:
            clips = [audio_embeds]
            tokens_per_clip = audio_embeds.shape[1]
        num_clips = sum(len(part) for part in clips if part is not None)
        num_runs = num_clips if audio_index is None else len(audio_index)
        if not torch.compiler.is_exporting():  # A graph raises no errors that depend on tokens.
            self._check_num_placeholders(int(is_audio.sum()), num_runs, tokens_per_clip)
        token_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_audio, 0))
        # Clips that no run uses are encoded all the same: with FSDP, the audio encoder must run on
        # every rank or on none.
        if num_clips == 0:
            return self._without_audio(token_embeds)
        if audio_embeds is None:
            audio_embeds = self.get_audio_features(input_features, audio_hidden_states)
        audio_embeds = audio_embeds.to(token_embeds)  # (clips, tokens, hidden)
        if audio_index is not None:
            audio_index = audio_index.to(audio_embeds.device)
            audio_embeds = audio_embeds[audio_index]  # (runs, tokens, hidden)
        return token_embeds.masked_scatter(is_audio[..., None], audio_embeds)

    def _check_num_placeholders(
        self, num_placeholders: int, num_runs: int, tokens_per_clip: int
    ) -> None:
        if num_placeholders != num_runs * tokens_per_clip:
            raise ValueError(
                f"{num_placeholders} audio placeholders in input_ids, but {num_runs} clips x "
                f"{tokens_per_clip} tokens = {num_runs * tokens_per_clip} audio embeddings. Each "
                f"clip needs one run of {tokens_per_clip} placeholders (token "
                f"{self.config.audio_token_id}); LtuProcessor writes them."
            )

    def _without_audio(self, token_embeds: Tensor) -> Tensor:
        """Return token embeddings of a batch without audio, (batch, length, hidden).

        If nothing in the language model is trained, no trained parameter would take part in the
        loss, and its backward pass would fail. So the projector takes part with a zero gradient.
        """
        projector = self.multi_modal_projector.linear
        is_trained = self.training and torch.is_grad_enabled() and projector.weight.requires_grad
        if not is_trained or any(p.requires_grad for p in self.language_model.parameters()):
            return token_embeds
        zero = 0 * (projector.weight.sum() + projector.bias.sum())
        return token_embeds + zero.to(token_embeds)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        audio_index: Tensor | None = None,
        audio_embeds: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        loss_tokens: Tensor | None = None,
        audio_hidden_states: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Compute logits (batch, length, vocabulary), and the loss if there are `labels`.

        Args:
            input_ids: (batch, length) text tokens and runs of `num_audio_tokens` placeholders
                `audio_token_id`, anywhere.
            attention_mask: (batch, past + length), 1 for audio and text, 0 for padding; all ones if
                absent. Masks of other shapes, which `generate` makes, go to the language model.
            input_features: (clips, frames, mel bins), one clip per run, in the order of the rows.
            labels: (batch, length); -100 carries no loss.
            position_ids: (batch, length); by default positions count unmasked tokens only. The
                original's training counts padding too.
            inputs_embeds: (batch, length, hidden), in place of `input_ids`.
            audio_index: (runs,) the clip of each run, where several runs share a clip, or a clip
                has no run.
            audio_embeds: (clips, tokens of a clip, hidden), such as those of `get_audio_features`,
                in place of `input_features`.
            prompt_embeds: (batch, prompt length, hidden) embeddings of the first tokens of
                `input_ids`, made by `generate`. Not used where a cache holds the audio already.
            logits_to_keep: positions whose logits are computed, the last n or their indices; all if
                0, or if the language model has no such argument.
            loss_tokens: (batch,) the number by which the loss of each row, a sum over its tokens,
                is divided. The loss is (batch,) then, otherwise the mean over all tokens. So a
                batch can hold several micro-batches, each with a mean of its own.
            audio_hidden_states: (clips, num_audio_tokens, audio hidden) outputs of the audio
                encoder. These clips come before those of `input_features`.
            kwargs: go to the language model as they are, among them its cache, whose name depends
                on the version of transformers.

        Raises:
            ValueError: the number of placeholders does not fit the number of clips.
        """
        has_cache = any(isinstance(value, Cache) for value in kwargs.values())
        has_clips = any(
            clips is not None for clips in (input_features, audio_embeds, prompt_embeds)
        )
        if inputs_embeds is None and has_cache and not has_clips and input_ids.shape[1] == 1:
            # A step of decoding. Its token was generated, so it is no placeholder: logits have no
            # column for these. Without counting them, the host need not wait for the GPU at every
            # token, and the step is one graph for torch.compile.
            inputs_embeds = self.get_input_embeddings()(input_ids)
        elif inputs_embeds is None:
            inputs_embeds = self._embed(
                input_ids,
                input_features,
                audio_index,
                audio_embeds,
                prompt_embeds,
                audio_hidden_states,
            )
        batch_size, length = inputs_embeds.shape[:2]
        if position_ids is None and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        # Without mask and cache, transformers takes gaps in position_ids for borders of packed
        # sequences, which would cut the audio off.
        if attention_mask is None and position_ids is not None and not has_cache:
            attention_mask = inputs_embeds.new_ones(batch_size, length, dtype=torch.long)
        if "logits_to_keep" in signature(self.language_model.forward).parameters:
            kwargs["logits_to_keep"] = logits_to_keep
        output = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels if loss_tokens is None else None,
            **kwargs,
        )
        if loss_tokens is not None:
            losses = sum_losses(output.logits, labels)
            output["loss"] = losses / loss_tokens.to(losses.device)
        return output

    def is_own(self, key: str) -> bool:
        """Return whether a checkpoint folder holds this key of the state dict."""
        if key.startswith("audio_tower.") and hasattr(self.audio_tower, "is_own"):
            return self.audio_tower.is_own(key.removeprefix("audio_tower."))
        return (
            self.config.language_model is None
            or ".lora_" in key
            or not key.startswith("language_model.")
        )

    def save_pretrained(
        self, save_directory: str | Path, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Write `config.json` and `model.safetensors`.

        The weights are those of audio encoder, projector and LoRA. Those of the language model, or
        of an encoder of transformers, are left out if the config names a folder or hub id that
        holds them.

        Raises:
            ValueError: a weight is NaN or infinite. Nothing is written.
        """
        state_dict = self.state_dict() if state_dict is None else state_dict
        own_state = {key: value for key, value in state_dict.items() if self.is_own(key)}
        check_finite(own_state, f"{save_directory} is not written")
        # The names in memory: transformers would write some models under names of older versions.
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, state_dict=own_state, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stock `push_to_hub`, unless others could not find the language model.

        Raises:
            ValueError: the language model or the audio encoder is a folder of this machine.
        """
        named = {
            "language_model": self.config.language_model,
            "audio_config.encoder": self.config.named_encoder,
        }
        for field, name in named.items():
            if name is not None and Path(name).is_dir():
                kind = "language model" if field == "language_model" else "audio encoder"
                raise ValueError(
                    f"The checkpoint names its {kind} as {name}, a folder that others do not "
                    f"have. Set model.config.{field} to the hub id of the same model first."
                )
        return super().push_to_hub(*args, **kwargs)

    def _upload_modified_files(self, working_dir: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Upload what `save_pretrained` wrote, with the model card of the opened folder.

        The card describes the weights of the folder, so it is uploaded with these only.
        """
        folder = self.checkpoint_folder
        if folder is not None and (folder / CARD).is_file():
            if self._has_weights_of(folder):
                add_model_card(folder, Path(working_dir))
            else:
                logger.warning(
                    "The weights are not those of %s any more: its model card is not uploaded.",
                    folder,
                )
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _has_weights_of(self, folder: Path) -> bool:
        """Return whether the weights are equal to those that a checkpoint folder holds."""
        own_state = {key: value for key, value in self.state_dict().items() if self.is_own(key)}
        stored_keys = set()
        for file in weight_files(folder, formats=("safetensors",)):
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  the file is no dict
                    stored_keys.add(key)
                    stored = tensors.get_tensor(key)
                    own = own_state.get(key)
                    if own is None or own.dtype != stored.dtype:
                        return False
                    if not torch.equal(own.cpu(), stored):
                        return False
        return set(own_state) - stored_keys <= set(self.all_tied_weights_keys)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: LtuConfig | None = None,
        language_model: str | Path | None = None,
        dtype: str | torch.dtype = "auto",
        device_map: str | dict | None = None,
        **kwargs: Any,
    ) -> "LtuForConditionalGeneration":
        """Open a checkpoint folder, or a hub id that holds one.

        Args:
            config: replaces the config of the folder.
            language_model: another folder or hub id of the same language model, instead of the one
                that the checkpoint names.
            dtype: of the frozen language model; "auto" keeps the dtype of its files. Trained
                weights stay fp32.
            device_map: passed to the language model. Audio encoder and projector go to the device
                of its embeddings.
            kwargs: `HUB_ARGUMENTS` and `LLM_ARGUMENTS`.

        Raises:
            ValueError: the language model is not the one that the checkpoint was trained with, or a
                key of the checkpoint is missing or left over, or a weight is NaN or infinite.
            TypeError: there is no such argument.
        """
        hub_kwargs = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        # The revision is that of the checkpoint; the language model is in another repository.
        llm_hub_kwargs = {name: value for name, value in hub_kwargs.items() if name != "revision"}
        dtype = kwargs.pop("torch_dtype", dtype)
        llm_kwargs = {name: kwargs.pop(name) for name in LLM_ARGUMENTS if name in kwargs}
        left_over = [
            name for name in kwargs if not name.startswith("_") and name not in AUTO_ARGUMENTS
        ]
        if left_over:
            raise TypeError(f"from_pretrained of LTU does not take {left_over}.")
        folder = find_checkpoint(pretrained_model_name_or_path, **hub_kwargs)
        config = config or cls.config_class.from_pretrained(folder)
        llm = None
        find_audio_encoder(config, folder, **llm_hub_kwargs)
        plan = copy.deepcopy(config)  # Of the model that is built to be compared with the files.
        if config.language_model is not None:
            if language_model:
                config.language_model = str(language_model)
            else:
                config.language_model = config.find_language_model(folder)
            check_language_model(config, folder, **llm_hub_kwargs)
            plan.text_config = open_model_config(config.language_model, **llm_hub_kwargs)
            check_same_sizes(config, plan.text_config, folder)
            check_stored_weights(plan, folder, Path(config.language_model))
            llm = load_llm(
                config.language_model,
                dtype=dtype,
                device_map=device_map,
                **llm_kwargs,
                **llm_hub_kwargs,
            )
            config.text_config = llm.config
        else:
            attention = llm_kwargs.pop("attn_implementation", None)
            if attention is not None:
                config._attn_implementation = attention
            given = llm_kwargs | {"language_model": language_model, "device_map": device_map}
            refused = {name for name, value in given.items() if value is not None}
            if refused:
                raise ValueError(
                    f"{folder} holds its language model; {refused} are only for a checkpoint whose "
                    "language model is elsewhere."
                )
            check_stored_weights(plan, folder)
            if dtype not in ("auto", None):
                # The dtype of the language model that is built from the config. LoRA stays fp32.
                config.text_config.dtype = (
                    getattr(torch, dtype) if isinstance(dtype, str) else dtype
                )
        model = cls(config, language_model=llm)
        model.load_named_encoder(**llm_hub_kwargs)
        model.load_own(folder)
        model.checkpoint_folder = folder
        if llm is not None:
            device = llm.get_input_embeddings().weight.device
            model.audio_tower.to(device)
            model.multi_modal_projector.to(device)
            if hasattr(llm, "hf_device_map"):
                # With a device map, the Trainer leaves the parts on their devices.
                model.hf_device_map = {
                    f"language_model.{name}": device for name, device in llm.hf_device_map.items()
                }
        return model.eval()

    def check_own(self, stored: dict[str, StoredTensor], folder: Path) -> None:
        """Compare the names and shapes of stored tensors with those that a checkpoint holds.

        Raises:
            ValueError: one is missing or left over, or has another shape, or contains no floats.
        """
        own = {key: value for key, value in self.state_dict().items() if self.is_own(key)}
        missing = own.keys() - stored.keys() - set(self.all_tied_weights_keys)
        left_over = stored.keys() - own.keys()
        if missing or left_over:
            raise ValueError(
                f"{folder} does not fit its own config: {len(missing)} keys missing "
                f"{sorted(missing)[:3]}, {len(left_over)} left over {sorted(left_over)[:3]}. Write "
                "the folder again with: python -m ltu.convert_checkpoint"
            )
        for key, tensor in stored.items():
            is_float = own[key].is_floating_point()
            if tensor.shape != tuple(own[key].shape) or tensor.is_float != is_float:
                kind = "float" if is_float else "integers"
                raise ValueError(
                    f"{folder} does not fit its own config: {key} is {tensor.dtype} of shape "
                    f"{[*tensor.shape]}, and {kind} of {[*own[key].shape]} by the config. Write "
                    "the folder again with: python -m ltu.convert_checkpoint"
                )

    def load_named_encoder(self, **hub_kwargs: Any) -> None:
        """Load the weights of an audio encoder that the config names, after `find_audio_encoder`.

        Raises:
            ValueError: they do not fit the config.
        """
        if self.config.named_encoder is not None:
            self.audio_tower.load_encoder(**hub_kwargs)

    def load_own(self, folder: Path) -> None:
        """Load the weights that a checkpoint folder holds, every key of them.

        Raises:
            FileNotFoundError: the folder holds no weights.
            ValueError: a key is missing or left over, or has another shape, two tied weights
                differ, or a weight is NaN or infinite.
        """
        files = weight_files(folder, formats=("safetensors",))
        self.check_own(read_headers(files), folder)
        state: dict[str, Tensor] = {}
        for file in files:
            state.update(load_file(file))
        for key, twin in self.all_tied_weights_keys.items():
            if {key, twin} <= state.keys() and not torch.equal(state[key], state[twin]):
                raise ValueError(
                    f"{folder} does not fit its own config: {key} and {twin} are one tensor by the "
                    "config, and two different ones in the file. Write the folder again with: "
                    "python -m ltu.convert_checkpoint"
                )
        check_finite(state, f"{folder} is not opened")
        self.load_state_dict(state, strict=False)


def sum_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of each row, summed over its tokens, (rows,).

    Args:
        logits: (rows, length, vocabulary), which predict the next token.
        labels: (rows, length); -100 carries no loss.
    """
    # Shift the labels, not the logits, whose copy would be large.
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # (rows, length)
    losses = F.cross_entropy(
        logits.float().flatten(0, 1),
        targets.flatten().to(logits.device),
        ignore_index=IGNORED,
        reduction="none",
    )  # (rows * length,)
    return losses.view(targets.shape).sum(1)


def build_on_meta(config: LtuConfig) -> LtuForConditionalGeneration:
    """Return the model that a config describes, without memory for its weights.

    Raises:
        ValueError: no model can be built of the config.
    """
    with torch.device("meta"), refuse_malformed(f"The config of {config.model_type}"):
        return AutoModelForCausalLM.from_config(config)


def check_stored_weights(config: LtuConfig, folder: Path, llm: Path | None = None) -> None:
    """Compare a config with the headers of the weight files, before memory is taken for weights.

    Args:
        config: of the checkpoint folder, with that of the language model as it is stored. It is
            changed.
        folder: the checkpoint folder.
        llm: that of the language model. One that is no folder, or quantized, or stored in another
            format than safetensors is not compared.

    Raises:
        FileNotFoundError: the checkpoint folder holds no weights.
        ValueError: a file is damaged, or does not have the tensors or shapes of the config.
    """
    own = read_headers(weight_files(folder, formats=("safetensors",)))
    llm_tensors = own
    if llm is not None:
        llm_files = sorted(llm.glob(WEIGHT_FILES["safetensors"])) if llm.is_dir() else []
        is_quantized = getattr(config.text_config, "quantization_config", None) is not None
        llm_tensors = {} if is_quantized else read_headers(llm_files)
    # Each layer has a tensor at least. A model of millions of layers would never be finished.
    for part, tensors in ((config.audio_config, own), (config.text_config, llm_tensors)):
        num_layers = getattr(part, "num_hidden_layers", 0)
        if tensors and num_layers > len(tensors):
            raise ValueError(
                f"{folder}: the config of {part.model_type} has {num_layers} layers, but the files "
                f"have {len(tensors)} tensors. Copy or write the folder again."
            )
    model = build_on_meta(config)
    model.check_own(own, folder)
    if llm is not None:
        for key, parameter in model.language_model.state_dict().items():
            bare_key = key.replace(".base_layer.", ".")
            stored = llm_tensors.get(bare_key)
            if stored is not None and stored.shape != tuple(parameter.shape):
                raise ValueError(
                    f"{llm} does not fit its own config: {bare_key} has the shape "
                    f"{[*stored.shape]}, and {[*parameter.shape]} by the config. Copy it again."
                )


def check_same_sizes(config: LtuConfig, text_config: PreTrainedConfig, folder: Path) -> None:
    """Check that a checkpoint describes its language model as that model does itself.

    Args:
        config: of the checkpoint.
        text_config: of the language model.

    Raises:
        ValueError: the two have other sizes.
    """
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        described = getattr(config.text_config, name, None)
        found = getattr(text_config, name, None)
        if described != found:
            raise ValueError(
                f"{folder}: text_config has {name} {described}, but {config.language_model} has "
                f"{found}. Name the right language model: --llm DIR_OR_ID (language_model=... in "
                "Python)."
            )


def load_llm(name: str, **settings: Any) -> PreTrainedModel:
    """Load a language model, every weight of it.

    Args:
        settings: arguments of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: its files lack a weight, which would be random.
    """
    model, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **settings)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{name} does not fit its own config: {len(missing)} keys missing {missing[:3]}. "
            "Copy or download it again."
        )
    return model


def find_audio_encoder(config: LtuConfig, folder: Path, **hub_kwargs: Any) -> None:
    """Find the audio encoder that a checkpoint names, if it does not hold it.

    Args:
        config: of the checkpoint; the name of the audio encoder becomes its hub id or absolute
            folder.
        hub_kwargs: as for `hash_model`.

    Raises:
        FileNotFoundError: there is no such audio encoder.
        ValueError: it is not the one that the checkpoint was trained with.
    """
    audio_config = config.audio_config
    if config.named_encoder is None:
        return
    audio_config.encoder = find_model(audio_config.encoder, folder)
    hint = "put it there, or change audio_config.encoder in config.json"
    found = hash_model(audio_config.encoder, "audio encoder", hint, **hub_kwargs)
    if audio_config.encoder_sha256 not in (None, found):
        raise ValueError(
            f"{folder} was trained with an audio encoder whose hash is "
            f"{audio_config.encoder_sha256[:12]}, but {audio_config.encoder} has {found[:12]}. "
            "Name the right one: audio_config.encoder in config.json"
        )


def check_language_model(config: LtuConfig, folder: Path, **hub_kwargs: Any) -> None:
    """Check that the language model is the one that a checkpoint was trained with.

    Args:
        hub_kwargs: as for `hash_model`.

    Raises:
        ValueError: its hash differs from the one in the config.
    """
    found = hash_model(config.language_model, **hub_kwargs)
    if config.language_model_sha256 not in (None, found):
        raise ValueError(
            f"{folder} was trained with a language model whose hash is "
            f"{config.language_model_sha256[:12]}, but {config.language_model} has {found[:12]}. "
            "Name the right one: --llm DIR_OR_ID (language_model=... in Python)."
        )


def register_model(config_class: type[LtuConfig], model_class: type[PreTrainedModel]) -> None:
    """Register a model with `AUTO_CLASSES`."""
    for auto_class in AUTO_CLASSES:
        auto_class.register(config_class, model_class)


register_model(LtuConfig, LtuForConditionalGeneration)
