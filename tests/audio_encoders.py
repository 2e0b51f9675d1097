"""Tiny audio models of transformers with random weights, one of each family, as folders.

`Family.expected` computes the time steps of a chunk with the classes of transformers alone, as the
documentation of each model describes its output.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio.functional
import transformers
from torch import Tensor
from transformers import FeatureExtractionMixin, PreTrainedConfig, PreTrainedModel

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
WAVEFORM_SIZES = SIZES | {
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
TWO_PARTS = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 60,
}
NO_TOKENS = {
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 4,
}
CLAP_TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 50,
}
CLAP_AUDIO = {
    "patch_embeds_hidden_size": 8,
    "hidden_size": 64,
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [2, 2, 2, 2],
    "num_hidden_layers": 4,
    "projection_dim": 16,
    "enable_fusion": False,
}
RATE = 16_000


@dataclass(frozen=True)
class Family:
    """An audio model and its feature extractor.

    Attributes:
        model: class of the saved model.
        config: of it.
        extractor: its feature extractor.
        expected: (model of the Auto class, features of a batch of one chunk) -> time steps
            (1, steps, hidden) of the whole chunk.
        chunk_seconds: length of a chunk in tests.
        call: arguments of the feature extractor, for a whole chunk.
        lora: layers for LoRA.
    """

    model: type[PreTrainedModel]
    config: PreTrainedConfig
    extractor: FeatureExtractionMixin
    expected: Callable[[PreTrainedModel, Tensor], Tensor]
    chunk_seconds: float = 1.28
    call: dict[str, Any] = field(default_factory=dict)
    lora: tuple[str, ...] = ("q_proj", "v_proj")


def _whisper_steps(model: PreTrainedModel, features: Tensor) -> Tensor:
    # One position per 20 ms; those behind the chunk are of the silence that pads it to 30 s.
    return model.encoder(features).last_hidden_state[:, :64]


def _ast_steps(model: PreTrainedModel, features: Tensor) -> Tensor:
    patches = model(features).last_hidden_state[:, 2:]  # Without the two special tokens.
    steps = patches.reshape(1, 12, 12, 32).mean(1)  # Rows are frequencies.
    return steps


def _waveform_steps(model: PreTrainedModel, features: Tensor) -> Tensor:
    return model(features).last_hidden_state


def _clap_steps(model: PreTrainedModel, features: Tensor) -> Tensor:
    # (batch, hidden, frequencies, steps)
    return model.audio_model(features).last_hidden_state.mean(2).transpose(1, 2)


def _fused_clap_steps(model: PreTrainedModel, features: Tensor) -> Tensor:
    # The feature extractor says of each clip alone that it is longer than the others.
    output = model.audio_model(features, is_longer=torch.tensor([[True]]))
    return output.last_hidden_state.mean(2).transpose(1, 2)


FAMILIES = {
    "ast": Family(
        transformers.ASTModel,
        transformers.ASTConfig(**SIZES, max_length=128, num_mel_bins=128),
        transformers.ASTFeatureExtractor(max_length=128),
        _ast_steps,
        lora=("q_proj", "v_proj"),
    ),
    "whisper": Family(
        transformers.WhisperForConditionalGeneration,
        transformers.WhisperConfig(**TWO_PARTS, **NO_TOKENS),
        transformers.WhisperFeatureExtractor(),
        _whisper_steps,
    ),
    "wav2vec2": Family(
        transformers.Wav2Vec2Model,
        transformers.Wav2Vec2Config(**WAVEFORM_SIZES, layerdrop=0.1),
        transformers.Wav2Vec2FeatureExtractor(),
        _waveform_steps,
    ),
    "hubert": Family(
        transformers.HubertForCTC,
        transformers.HubertConfig(**WAVEFORM_SIZES, vocab_size=32),
        transformers.Wav2Vec2FeatureExtractor(),
        _waveform_steps,
    ),
    "wavlm": Family(
        transformers.WavLMModel,
        transformers.WavLMConfig(**WAVEFORM_SIZES),
        transformers.Wav2Vec2FeatureExtractor(),
        _waveform_steps,
        lora=("intermediate_dense",),  # Its attention does not call q_proj.
    ),
    "clap": Family(
        transformers.ClapModel,
        transformers.ClapConfig(audio_config=CLAP_AUDIO, text_config=CLAP_TEXT, projection_dim=16),
        transformers.ClapFeatureExtractor(truncation="rand_trunc"),
        _clap_steps,
        chunk_seconds=10.0,
        lora=("query", "value"),
    ),
    "clap-fused": Family(
        transformers.ClapModel,
        transformers.ClapConfig(
            audio_config=CLAP_AUDIO | {"enable_fusion": True},
            text_config=CLAP_TEXT,
            projection_dim=16,
        ),
        transformers.ClapFeatureExtractor(),
        _fused_clap_steps,
        chunk_seconds=10.0,
        lora=("query", "value"),
    ),
    "wav2vec2-bert": Family(
        transformers.Wav2Vec2BertModel,
        transformers.Wav2Vec2BertConfig(**SIZES, feature_projection_input_dim=160),
        transformers.SeamlessM4TFeatureExtractor(feature_size=80),
        _waveform_steps,
        lora=("linear_q",),
    ),
}


def write_audio_model(folder: Path, family: Family, seed: int = 0) -> Path:
    """Write an audio model with random weights and its feature extractor as a folder."""
    torch.manual_seed(seed)
    model = family.model(family.config)
    # Larger than the usual init, so that one clip differs clearly from another.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    family.extractor.save_pretrained(folder)
    return folder


def expected_tokens(folder: Path, family: Family, waveform: np.ndarray, num_tokens: int) -> Tensor:
    """Return the audio tokens (num_tokens, hidden) of one whole chunk, by transformers alone."""
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    rate = extractor.sampling_rate
    tensor = torchaudio.functional.resample(torch.from_numpy(waveform), RATE, rate)
    output = extractor([tensor.numpy()], sampling_rate=rate, return_tensors="pt", **family.call)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        steps = family.expected(model, next(iter(output.values())))  # (1, steps, hidden)
    pooled = torch.nn.functional.adaptive_avg_pool1d(steps.transpose(1, 2), num_tokens)
    return pooled[0].T
