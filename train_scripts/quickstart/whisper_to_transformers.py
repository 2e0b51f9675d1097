"""Writes a Whisper of openai-whisper as a folder of transformers.

    python -m train_scripts.quickstart.whisper_to_transformers FILE.pt DIR

With access to the hub, openai/whisper-tiny.en is the same model.
"""

import argparse
import re
from pathlib import Path

import whisper
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from ltu.files import run_command

# Names of openai-whisper -> names of transformers, applied one after the other.
RENAMES = (
    (r"\.blocks\.", ".layers."),
    (r"\.cross_attn_ln\.", ".encoder_attn_layer_norm."),
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"\.attn_ln\.", ".self_attn_layer_norm."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp_ln\.", ".final_layer_norm."),
    (r"\.mlp\.0\.", ".fc1."),
    (r"\.mlp\.2\.", ".fc2."),
    (r"\.query\.", ".q_proj."),
    (r"\.key\.", ".k_proj."),
    (r"\.value\.", ".v_proj."),
    (r"attn\.out\.", "attn.out_proj."),
    (r"encoder\.ln_post\.", "encoder.layer_norm."),
    (r"decoder\.ln\.", "decoder.layer_norm."),
    (r"\.positional_embedding$", ".embed_positions.weight"),
    (r"\.token_embedding\.", ".embed_tokens."),
)


def rename(name: str) -> str:
    """Return the name of a parameter in transformers."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def convert(file: str | Path, output_dir: str | Path) -> None:
    """Write model and feature extractor; every parameter must be in the file.

    Args:
        file: an openai-whisper `.pt` file.
        output_dir: the folder to write.
    """
    model = whisper.load_model(str(file), device="cpu")
    dims = model.dims
    config = WhisperConfig(
        vocab_size=dims.n_vocab,
        num_mel_bins=dims.n_mels,
        d_model=dims.n_audio_state,
        encoder_layers=dims.n_audio_layer,
        decoder_layers=dims.n_text_layer,
        encoder_attention_heads=dims.n_audio_head,
        decoder_attention_heads=dims.n_text_head,
        encoder_ffn_dim=4 * dims.n_audio_state,
        decoder_ffn_dim=4 * dims.n_text_state,
        max_source_positions=dims.n_audio_ctx,
        max_target_positions=dims.n_text_ctx,
    )
    converted = WhisperModel(config)
    converted.load_state_dict({rename(name): value for name, value in model.state_dict().items()})
    converted.save_pretrained(output_dir)
    WhisperFeatureExtractor(feature_size=dims.n_mels).save_pretrained(output_dir)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("file", help="An openai-whisper .pt file.")
    parser.add_argument("output_dir", help="The folder to write.")
    args = parser.parse_args(argv)
    convert(args.file, args.output_dir)
    print(f"{args.output_dir}: written")


if __name__ == "__main__":
    run_command(main)
