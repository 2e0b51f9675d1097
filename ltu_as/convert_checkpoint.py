"""Converts released files and pretrained components into a checkpoint folder of LTU-AS.

    python -m ltu_as.convert_checkpoint --llm LLM --checkpoint FILE_OR_DIR --output_dir DIR
    python -m ltu_as.convert_checkpoint --init --llm LLM --audio_encoder FILE --output_dir DIR
    python -m ltu_as.convert_checkpoint --init --llm LLM --whisper FILE.pt --output_dir DIR
    python -m ltu_as.convert_checkpoint --model DIR --to_original FILE.bin
    python -m ltu_as.convert_checkpoint --model DIR --merge --output_dir DIR

LLM is a folder or a hub id. `--audio_encoder` takes TLTR from a Whisper-AT file of the full width
("ori"), such as whisper_at_large_v1.pth, or from a released folder, such as vicuna_ltuas. Without
it, TLTR is initialised at random, with a warning.
"""

import argparse
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

import ltu.convert_checkpoint
import ltu_as  # noqa: F401  registers the classes that the Auto classes look up
from ltu.checkpoints.convert import LtuKind
from ltu.checkpoints.original_checkpoints import REFUSED
from ltu.data.check_examples import read_rows
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
        f"{REFUSED}a 'low' Whisper-AT has a layer that LTU-AS lacks, and is 512 wide; use 'ori'",
    ),
]


class LtuAsKind(LtuKind):
    """The classes, keys and flags of LTU-AS for `ltu.convert_checkpoint`."""

    config_class = LtuAsConfig
    processor_class = LtuAsProcessor
    audio_encoder_keys = TLTR_KEYS

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--whisper",
            default="large-v1",
            help="Whisper of the features: a name, or an openai-whisper .pt file",
        )
        parser.add_argument(
            "--transcription_model",
            help="Whisper of the transcripts (default: large-v2 for large-v1, else the same)",
        )
        parser.add_argument(
            "--feature_precision",
            default="fp16",
            choices=("fp16", "fp32"),
            help="precision of Whisper's encoder",
        )
        parser.add_argument(
            "--feature_root", help="with --standardize_on: the folder of the features of its clips"
        )
        parser.add_argument(
            "--standardize_on",
            help="a dataset file; a random TLTR scales channels by their mean and std on its clips",
        )
        parser.add_argument(
            "--num_time_heads",
            type=int,
            default=1,
            help="attention heads of TLTR over time, which no file states",
        )
        parser.add_argument(
            "--num_layer_heads",
            type=int,
            default=8,
            help="attention heads of TLTR over layers, which no file states",
        )

    def make_audio_config(self, state: dict[str, Tensor], args: argparse.Namespace) -> TltrConfig:
        """Return the config of TLTR, with the sizes of the Whisper.

        Args:
            state: the weights of TLTR, which are checked against the sizes; empty for a random one.
            args: flags of the command.

        Raises:
            ValueError: the weights are for another Whisper, or the flags contradict each other.
        """
        layers, width = LtuAsFeatureExtractor.shape_of(args.whisper)
        query = state.get("audio_tower.time_tr.attn.query.weight")
        if state and len(query) != width:
            raise ValueError(
                f"The file holds a TLTR of width {len(query)}, but Whisper {args.whisper} has "
                f"features of width {width}. Name the Whisper that TLTR was trained with: --whisper"
            )
        if args.standardize_on and (state or not args.feature_root):
            raise ValueError(
                "--standardize_on is for a random TLTR (no --audio_encoder), and needs "
                "--feature_root."
            )
        return TltrConfig(
            hidden_size=width,
            num_whisper_layers=layers,
            num_time_heads=args.num_time_heads,
            num_layer_heads=args.num_layer_heads,
            standardize=bool(args.standardize_on),
        )

    def finish_audio_encoder(self, state: dict[str, Tensor], args: argparse.Namespace) -> None:
        """Add mean and standard deviation of the features of `--standardize_on` to the weights.

        They are those of each channel of each layer.

        Raises:
            ValueError: the feature folder holds none of the clips.
        """
        if not args.standardize_on:
            return
        store = FeatureStore(args.feature_root)
        audio_ids = {row["audio_id"] for row in read_rows(args.standardize_on) if row["audio"]}
        count = 0
        total = 0.0
        squares = 0.0
        for audio_id in sorted(audio_ids):
            stored = store.read(audio_id)
            if stored is None:
                continue
            features = stored.features.double()  # (layers, time, width)
            total = total + features.sum(1, True)
            squares = squares + features.square().sum(1, True)
            count += features.shape[1]
        if not count:
            raise ValueError(
                f"{args.feature_root} holds features of no clip of {args.standardize_on}."
            )
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=1e-10)
        state["audio_tower.feature_mean"] = mean.float()  # (layers, 1, width)
        state["audio_tower.feature_std"] = variance.sqrt().float()

    def extractor_settings(self, args: argparse.Namespace) -> dict:
        """Return the arguments of `LtuAsFeatureExtractor`."""
        settings = {
            "whisper_model": args.whisper,
            "transcription_model": args.transcription_model or TEXT_MODELS.get(args.whisper),
            "feature_precision": args.feature_precision,
        }
        # A model with an official name may not be downloaded yet; its fingerprint is set at the
        # first use.
        if Path(args.whisper).is_file():
            extractor = LtuAsFeatureExtractor(None, None, args.whisper)
            settings["whisper_fingerprint"] = extractor.describe()["fingerprint"]
        return settings


def main(argv: list[str] | None = None) -> None:
    ltu.convert_checkpoint.main(argv, LtuAsKind())


if __name__ == "__main__":
    run_command(main, KeyError, SafetensorError)
