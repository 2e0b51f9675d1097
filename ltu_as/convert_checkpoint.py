"""Released files and small parts -> a checkpoint folder of LTU-AS, every key accounted for.

    python -m ltu_as.convert_checkpoint --llm DIR_OR_ID --checkpoint FILE_OR_DIR --output_dir DIR
    python -m ltu_as.convert_checkpoint --init --llm DIR_OR_ID --audio_encoder whisper_at_large_v1.pth --output_dir DIR
    python -m ltu_as.convert_checkpoint --init --llm DIR_OR_ID --audio_encoder vicuna_ltuas --output_dir DIR
    python -m ltu_as.convert_checkpoint --init --llm DIR_OR_ID --whisper whisper-tiny.en/whisper.pt --output_dir DIR
    python -m ltu_as.convert_checkpoint --model DIR --to_original FILE.bin
    python -m ltu_as.convert_checkpoint --model DIR --merge --output_dir DIR

`--audio_encoder` is the TLTR of a Whisper-AT file ("ori", the full width), of a released folder, or none: random, said loudly.
"""

import argparse
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

import ltu.convert_checkpoint
import ltu_as  # noqa: F401  registers the classes that the Auto classes look up
from ltu.checkpoints.convert import LtuKind
from ltu.checkpoints.original_checkpoints import REFUSED
from ltu.data.examples import read_rows
from ltu.files import run_command
from ltu_as.configuration_ltu_as import LtuAsConfig, TltrConfig
from ltu_as.feature_extraction_ltu_as import TEXT_MODELS, LtuAsFeatureExtractor
from ltu_as.feature_store import FeatureStore
from ltu_as.processing_ltu_as import LtuAsProcessor

TLTR_KEYS = [
    (r"((?:time|layer)_tr\..+)", r"audio_tower.\1", None),
    (r"mlp_layer\..+", None, "the classifier of AudioSet's 527 classes"),
    (
        r"down_layer\..+",
        None,
        f"{REFUSED}a 'low' Whisper-AT, 512 wide behind a layer that LTU-AS has not; take 'ori'",
    ),
]


class LtuAsKind(LtuKind):
    config_class = LtuAsConfig
    processor_class = LtuAsProcessor
    audio_encoder_keys = TLTR_KEYS

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--whisper",
            default="large-v1",
            help="gives features: a name, or an openai-whisper .pt file",
        )
        parser.add_argument(
            "--transcription_model",
            help="gives transcripts (large-v2 beside large-v1, else the same)",
        )
        parser.add_argument(
            "--feature_precision", default="fp16", choices=("fp16", "fp32"), help="of its encoder"
        )
        parser.add_argument(
            "--feature_root", help="with --standardize_on: where the features of its clips lie"
        )
        parser.add_argument(
            "--standardize_on",
            help="rows; a random TLTR then takes channels with their mean and std",
        )
        parser.add_argument(
            "--num_time_heads", type=int, default=1, help="of TLTR; no file shows it"
        )
        parser.add_argument(
            "--num_layer_heads", type=int, default=8, help="of TLTR; no file shows it"
        )

    def make_audio_config(self, state: dict[str, Tensor], args: argparse.Namespace) -> TltrConfig:
        """Sizes of the Whisper, held against the tensors, if there are any."""
        layers, width = LtuAsFeatureExtractor.shape_of(args.whisper)
        query = state.get("audio_tower.time_tr.attn.query.weight")
        if state and len(query) != width:
            raise ValueError(
                f"The file holds a TLTR of width {len(query)}, but Whisper {args.whisper} gives features of width "
                f"{width}. Name the Whisper that it was trained with: --whisper"
            )
        if args.standardize_on and (state or not args.feature_root):
            raise ValueError(
                "--standardize_on is for a random TLTR (no --audio_encoder), and needs --feature_root."
            )
        heads = {"num_time_heads": args.num_time_heads, "num_layer_heads": args.num_layer_heads}
        scale = {"standardize": bool(args.standardize_on)}
        return TltrConfig(hidden_size=width, num_whisper_layers=layers, **heads, **scale)

    def finish_audio_encoder(self, state: dict[str, Tensor], args: argparse.Namespace) -> None:
        """Mean and deviation of each channel of each layer over the clips of `--standardize_on`."""
        if not args.standardize_on:
            return
        store, count, total, squares = FeatureStore(args.feature_root), 0, 0.0, 0.0
        names = {row["audio_id"] for row in read_rows(args.standardize_on) if row["audio"]}
        for stored in map(store.read, sorted(names)):
            if stored is not None:
                features = stored.features.double()  # (layers, time, width)
                total, squares = (
                    total + features.sum(1, True),
                    squares + features.square().sum(1, True),
                )
                count += features.shape[1]
        if not count:
            raise ValueError(
                f"{args.feature_root} holds features of no clip of {args.standardize_on}."
            )
        mean = total / count
        state["audio_tower.feature_mean"] = mean.float()  # (layers, 1, width)
        state["audio_tower.feature_std"] = (
            (squares / count - mean.square()).clamp(min=1e-10).sqrt().float()
        )

    def extractor_settings(self, args: argparse.Namespace) -> dict:
        text_model = args.transcription_model or TEXT_MODELS.get(args.whisper)
        settings = {"whisper_model": args.whisper, "transcription_model": text_model}
        if Path(args.whisper).is_file():  # Of an official name it is taken at the first use.
            settings["whisper_fingerprint"] = LtuAsFeatureExtractor(
                None, None, args.whisper
            ).describe()["fingerprint"]
        return settings | {"feature_precision": args.feature_precision}


def main(argv: list[str] | None = None) -> None:
    ltu.convert_checkpoint.main(argv, LtuAsKind())


if __name__ == "__main__":
    run_command(main, KeyError, SafetensorError)
