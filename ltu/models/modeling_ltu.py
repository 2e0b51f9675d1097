"""LTU: what the ear hears becomes a few vectors of the language model's width, in front of the question.

Notable:
- The language model is any stock Hugging Face causal LM; peft injects LoRA into it. Nothing is forked or patched.
- A sequence is `[audio placeholders][pads][text]`. Placeholders carry an id one past the vocabulary; the model goes by
  id and mask, so pads may stand anywhere and one audio prefix can be shared by many questions.
- A checkpoint holds what was trained, and the name and hash of its language model, not a copy of it, unless that was
  trained too.
- Ear, projection and LoRA stay in fp32, in memory and on disk; a frozen language model may be bf16. Autocast does the
  rest.
"""

from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ltu.models.checkpoint_folder import find_checkpoint, hash_language_model
from ltu.models.configuration_ltu import LtuConfig
from ltu.models.generation_ltu import LtuGenerationMixin
from ltu.models.lora import find_targets, inject_lora

# What each plan trains: prefixes of parameter names, or the infix of LoRA's. The original's names for the plans.
TRAINABLE_PLANS = {
    "proj": ("multi_modal_projector.",),
    "all": ("audio_tower.", "multi_modal_projector.", ".lora_"),
}

# What `from_pretrained` hands to the hub, and to the language model.
HUB_ARGUMENTS = ("cache_dir", "revision", "token", "local_files_only", "force_download")
AUTO_ARGUMENTS = ("trust_remote_code", "adapter_kwargs", "code_revision")  # The Auto classes' own.
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


class LtuForConditionalGeneration(PreTrainedModel, LtuGenerationMixin):
    """An ear (`audio_tower`), a projection (`multi_modal_projector`) and a causal language model (`language_model`).

    Args:
        config: sizes of all three.
        language_model: a loaded causal LM. Without one it is built from `config.text_config` with random weights.
    """

    config_class = LtuConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    # The loss is a mean over each micro-batch, averaged over accumulation steps; the Trainer would divide by all tokens
    # instead.
    accepts_loss_kwargs = False

    def __init__(self, config: LtuConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        self.audio_tower = AutoModel.from_config(config.audio_config)
        self.multi_modal_projector = LtuMultiModalProjector(config)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        # One object, so that both know of the attention implementation and the size of the vocabulary.
        config.text_config = self.language_model.config
        self.language_model.requires_grad_(False)
        if config.lora:
            inject_lora(self.language_model, config.lora)
        self.post_init()

    def init_weights(self) -> None:
        """Nothing: each part has initialised itself, and a loaded language model keeps its weights."""

    def add_lora(
        self, r: int, alpha: int, dropout: float, target_modules: list[str] | None = None
    ) -> None:
        """Give the language model a fresh LoRA, whose product is zero at first; `find_targets` says where by default.

        Raises:
            ValueError: the model has one already, or no such layers.
        """
        if self.config.lora:
            raise ValueError(
                f"The model already has LoRA {self.config.lora}. Continue with it: leave the --lora_* flags out."
            )
        targets = find_targets(self.language_model, target_modules)
        self.config.lora = {"r": r, "alpha": alpha, "dropout": dropout, "target_modules": targets}
        inject_lora(self.language_model, self.config.lora)

    def set_trainable(self, plan: str) -> None:
        """Freeze everything but what `plan` names: "proj", or "all" (ear, projection and LoRA)."""
        marks = TRAINABLE_PLANS[plan]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(
                any(
                    mark in name if mark.startswith(".") else name.startswith(mark)
                    for mark in marks
                )
            )

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def get_audio_features(self, input_features: Tensor) -> Tensor:
        """(clips, frames, mel bins) spectrograms -> (clips, num_audio_tokens, hidden) vectors for the language
        model."""
        weight = self.multi_modal_projector.linear.weight
        audio_hidden = self.audio_tower(
            input_features.to(weight.device, weight.dtype)
        )  # (clips, tokens, audio hidden)
        return self.multi_modal_projector(
            audio_hidden / self.config.audio_config.feature_divisor
        )  # (clips, tokens, hidden)

    def _embed(
        self,
        input_ids: Tensor,
        input_features: Tensor | None = None,
        audio_index: Tensor | None = None,
        audio_embeds: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
    ) -> Tensor:
        """Token embeddings, with audio embeddings at the placeholders: (batch, length, hidden)."""
        input_ids = input_ids.to(self.get_input_embeddings().weight.device)
        is_audio = input_ids == self.config.audio_token_id  # (batch, length)
        num_placeholders = int(is_audio.sum())
        prompt_length = 0 if prompt_embeds is None else prompt_embeds.shape[1]
        if num_placeholders and 0 < prompt_length <= input_ids.shape[1]:
            new_embeds = self.get_input_embeddings()(input_ids[:, prompt_length:])
            return torch.cat([prompt_embeds, new_embeds], dim=1)

        if audio_embeds is None:
            clips, tokens_per_clip = input_features, self.config.num_audio_tokens
        else:
            clips, tokens_per_clip = audio_embeds, audio_embeds.shape[1]
        num_clips = 0 if clips is None else len(clips)
        num_runs = num_clips if audio_index is None else len(audio_index)
        if num_placeholders != num_runs * tokens_per_clip:
            raise ValueError(
                f"{num_placeholders} audio placeholders in input_ids, but {num_runs} clips x "
                f"{tokens_per_clip} tokens = {num_runs * tokens_per_clip} audio vectors. Each clip "
                f"needs one run of {tokens_per_clip} placeholders (id "
                f"{self.config.audio_token_id}); LtuProcessor writes them."
            )
        token_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_audio, 0))
        if num_runs == 0:
            return token_embeds
        if audio_embeds is None:
            audio_embeds = self.get_audio_features(input_features)
        audio_embeds = audio_embeds.to(token_embeds)  # (clips, tokens, hidden)
        if audio_index is not None:
            audio_embeds = audio_embeds[
                audio_index.to(audio_embeds.device)
            ]  # (runs, tokens, hidden)
        return token_embeds.masked_scatter(is_audio[..., None], audio_embeds)

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
        **kwargs: Any,
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
            audio_index: (runs,) the clip of each run, where several runs share a clip.
            audio_embeds: (clips, tokens of a clip, hidden), such as those of `get_audio_features`, in
                place of `input_features`.
            prompt_embeds: (batch, prompt length, hidden) embeddings of the first tokens of
                `input_ids`, made by `generate`. Not used where a cache holds the audio already.
            logits_to_keep: positions whose logits are computed, the last n or their indices; all if
                0, or if the language model has no such argument.
            kwargs: go to the language model as they are, among them its cache, whose name depends
                on the version of transformers.

        Raises:
            ValueError: the number of placeholders does not fit the number of clips.
        """
        if inputs_embeds is None:
            inputs_embeds = self._embed(
                input_ids, input_features, audio_index, audio_embeds, prompt_embeds
            )
        batch_size, length = inputs_embeds.shape[:2]
        if position_ids is None and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        # Without mask and cache, transformers takes gaps in position_ids for borders of packed
        # sequences, which would cut the audio off.
        has_cache = any(isinstance(value, Cache) for value in kwargs.values())
        if attention_mask is None and position_ids is not None and not has_cache:
            attention_mask = inputs_embeds.new_ones(batch_size, length, dtype=torch.long)
        if "logits_to_keep" in signature(self.language_model.forward).parameters:
            kwargs["logits_to_keep"] = logits_to_keep
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            **kwargs,
        )

    def is_own(self, key: str) -> bool:
        """Whether a checkpoint of ours holds this key of the state dict."""
        return (
            self.config.language_model is None
            or ".lora_" in key
            or not key.startswith("language_model.")
        )

    def save_pretrained(
        self, save_directory: str | Path, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Write `config.json` and `model.safetensors`: ear, projection and LoRA; the language model only if it has no
        other home."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        super().save_pretrained(
            save_directory,
            state_dict={k: v for k, v in state_dict.items() if self.is_own(k)},
            **kwargs,
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Stock `push_to_hub`, once the language model has a name that others can find it by.

        Raises:
            ValueError: the language model is a folder of this machine.
        """
        name = self.config.language_model
        if name is not None and Path(name).is_dir():
            raise ValueError(
                f"The checkpoint names its language model as {name}, which others do not have. Set "
                "model.config.language_model to the hub id of the same model first."
            )
        return super().push_to_hub(*args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: LtuConfig | None = None,
        language_model: str | Path | None = None,
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        **kwargs: Any,
    ) -> "LtuForConditionalGeneration":
        """Open a checkpoint folder, or a hub id that holds one.

        Args:
            language_model: another place of the same language model, instead of the one that the folder names.
            dtype: of the frozen language model; "auto" keeps the stored one. What was trained stays fp32.
            device_map: handed to the language model; ear and projection go where its embeddings are.

        Raises:
            ValueError: the language model is not the one that the folder was trained with.
            KeyError: a key of the checkpoint is missing or left over.
        """
        hub_kwargs = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        dtype = kwargs.pop("torch_dtype", dtype)
        llm_kwargs = {name: kwargs.pop(name) for name in LLM_ARGUMENTS if name in kwargs}
        given = llm_kwargs | {"language_model": language_model, "device_map": device_map}
        left_over = [
            name for name in kwargs if not name.startswith("_") and name not in AUTO_ARGUMENTS
        ]
        if left_over:
            raise TypeError(f"from_pretrained of LTU does not take {left_over}.")
        folder = find_checkpoint(pretrained_model_name_or_path, **hub_kwargs)
        config = config or cls.config_class.from_pretrained(folder)
        llm = None
        if config.language_model is not None:
            config.language_model = (
                str(language_model) if language_model else config.find_language_model(folder)
            )
            check_language_model(config, folder)
            llm = AutoModelForCausalLM.from_pretrained(
                config.language_model, dtype=dtype, device_map=device_map, **llm_kwargs
            )
            config.text_config = llm.config
        elif refused := {name for name, value in given.items() if value is not None}:
            raise ValueError(
                f"{folder} holds its language model; these are for one that lies elsewhere: {refused}."
            )
        elif dtype not in ("auto", None):  # Of what is built; LoRA is fp32 all the same.
            config.text_config.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        model = cls(config, language_model=llm)
        model._load_own(folder)
        if llm is not None:
            device = llm.get_input_embeddings().weight.device
            model.audio_tower.to(device)
            model.multi_modal_projector.to(device)
            if hasattr(llm, "hf_device_map"):  # The Trainer must leave the parts where they are.
                model.hf_device_map = {
                    f"language_model.{name}": place for name, place in llm.hf_device_map.items()
                }
        return model.eval()

    def _load_own(self, folder: Path) -> None:
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"{folder} holds no model.safetensors. Write one with: python -m ltu.convert_checkpoint"
            )
        state = {key: value for file in files for key, value in load_file(file).items()}
        wanted = {key for key in self.state_dict() if self.is_own(key)}
        missing, left_over = (
            wanted - set(state) - set(self.all_tied_weights_keys),
            set(state) - wanted,
        )
        if missing or left_over:
            raise KeyError(
                f"{folder} does not fit its own config: {len(missing)} keys missing {sorted(missing)[:3]}, "
                f"{len(left_over)} left over "
                f"{sorted(left_over)[:3]}. Write the folder again with: python -m ltu.convert_checkpoint"
            )
        self.load_state_dict(state, strict=False)


def check_language_model(config: LtuConfig, folder: Path) -> None:
    found = hash_language_model(config.language_model)
    if config.language_model_sha256 not in (None, found):
        raise ValueError(
            f"{folder} was trained with a language model whose hash is {config.language_model_sha256[:12]}, but "
            f"{config.language_model} "
            f"has {found[:12]}. Name the right one: --llm DIR_OR_ID (language_model=... in Python)."
        )


AutoModelForCausalLM.register(LtuConfig, LtuForConditionalGeneration)
AutoModel.register(LtuConfig, LtuForConditionalGeneration)
