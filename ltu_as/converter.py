"""Makes checkpoint folders of LTU-AS from original files and pretrained components."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ltu.checkpoints.convert import CONVERTERS, LtuConverter
from ltu.checkpoints.original_checkpoints import KeyRule
from ltu.data.check_examples import add_ignored_keys, parse_ignored_keys, read_examples
from ltu_as.configuration_ltu_as import LtuAsConfig, TltrConfig
from ltu_as.feature_extraction_ltu_as import TEXT_MODELS, LtuAsFeatureExtractor
from ltu_as.feature_store import FeatureStore
from ltu_as.processing_ltu_as import LtuAsProcessor

TLTR_KEYS = [
    KeyRule(r"((?:time|layer)_tr\..+)", r"audio_tower.\1"),
    KeyRule(r"mlp_layer\..+", drop="the classifier of AudioSet's 527 classes"),
    KeyRule(
        r"down_layer\..+",
        refuse="a 'low' Whisper-AT has a layer that LTU-AS lacks, and is 512 wide; use 'ori'",
    ),
]


@dataclass
class LtuAsConverter(LtuConverter):
    """Makes checkpoint folders of LTU-AS.

    Attributes:
        whisper: the Whisper of the features, a name or an openai-whisper `.pt` file.
        transcription_model: the Whisper of the transcripts.
        feature_precision: of Whisper's encoder, "fp16" or "fp32".
        feature_root: the folder of the features of the clips of `standardize_on`. The number of
            audio tokens, and whether short clips are repeated, are those of these features.
        standardize_on: a dataset file; a random TLTR scales each channel by its mean and standard
            deviation on these clips.
        ignored_keys: keys of its examples that are ignored, separated by commas.
        num_time_heads, num_layer_heads: attention heads of TLTR, which no file states.
    """

    config_class: ClassVar[type[LtuAsConfig]] = LtuAsConfig
    processor_class: ClassVar[type[LtuAsProcessor]] = LtuAsProcessor
    audio_encoder_keys: ClassVar[list[KeyRule]] = TLTR_KEYS
    takes_other_encoders: ClassVar[bool] = False

    whisper: str = "large-v1"
    transcription_model: str | None = None
    feature_precision: str = "fp16"
    feature_root: str | None = None
    standardize_on: str | None = None
    ignored_keys: str = ""
    num_time_heads: int = 1
    num_layer_heads: int = 8

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--whisper",
            default=cls.whisper,
            help="The Whisper of the features: a name, or an openai-whisper .pt file.",
        )
        parser.add_argument(
            "--transcription_model",
            help="The Whisper of the transcripts. The default is large-v2 for large-v1, and else "
            "the same model.",
        )
        parser.add_argument(
            "--feature_precision",
            default=cls.feature_precision,
            choices=("fp16", "fp32"),
            help="The precision of Whisper's encoder.",
        )
        parser.add_argument(
            "--feature_root",
            help="With --standardize_on: the folder of the features of its clips.",
        )
        parser.add_argument(
            "--standardize_on",
            help="A dataset file, on whose clips a random TLTR scales channels by mean and std.",
        )
        add_ignored_keys(parser)
        parser.add_argument(
            "--num_time_heads",
            type=int,
            default=cls.num_time_heads,
            help="The attention heads of TLTR over time, which no file states.",
        )
        parser.add_argument(
            "--num_layer_heads",
            type=int,
            default=cls.num_layer_heads,
            help="The attention heads of TLTR over layers, which no file states.",
        )

    def make_audio_config(self, state: dict[str, Tensor]) -> TltrConfig:
        """Return the config of TLTR, with the sizes of the Whisper.

        Args:
            state: the weights of TLTR, which are checked against the sizes; empty for a random one.

        Raises:
            ValueError: the weights are for another Whisper, or the flags contradict each other.
        """
        layers, width = LtuAsFeatureExtractor.shape_of(self.whisper)
        query = state.get("audio_tower.time_tr.attn.query.weight")
        if state and len(query) != width:
            raise ValueError(
                f"The file holds a TLTR of width {len(query)}, but Whisper {self.whisper} has "
                f"features of width {width}. Name the Whisper that TLTR was trained with: --whisper"
            )
        if self.standardize_on and (state or not self.feature_root):
            raise ValueError(
                "--standardize_on is for a random TLTR (no --audio_encoder), and needs "
                "--feature_root."
            )
        if self.feature_root and not self.standardize_on:
            raise ValueError("--feature_root has an effect only with --standardize_on.")
        if self.ignored_keys and not self.standardize_on:
            raise ValueError("--ignored_keys has an effect only with --standardize_on.")
        return TltrConfig(
            hidden_size=width,
            num_whisper_layers=layers,
            num_audio_tokens=self._num_audio_tokens(),
            num_time_heads=self.num_time_heads,
            num_layer_heads=self.num_layer_heads,
            standardize=bool(self.standardize_on),
        )

    def _describe_features(self) -> dict[str, Any]:
        """Return the settings of the features in `feature_root`, if it is given and states them."""
        return FeatureStore(self.feature_root).description if self.feature_root else {}

    def _num_audio_tokens(self) -> int:
        """Return the time steps of the features in `feature_root`; by default the original's."""
        shape = self._describe_features().get("shape")  # (layers, time, width)
        return shape[1] if shape else TltrConfig().num_audio_tokens

    def finish_audio_encoder(self, state: dict[str, Tensor]) -> None:
        """Add mean and standard deviation of the features of `--standardize_on` to the weights.

        They are those of each channel of each layer.

        Raises:
            ValueError: the feature folder holds none of the clips, or features of audio that has
                changed since.
        """
        if not self.standardize_on:
            return
        store = FeatureStore(self.feature_root)
        ignored_keys = parse_ignored_keys(self.ignored_keys)
        examples = read_examples(self.standardize_on, need_output=False, ignored_keys=ignored_keys)
        clips = {}  # Path of each clip, by its audio_id.
        for example in examples:
            if example["audio"]:
                clips[example["audio_id"]] = example["audio"]
        num_clips = 0
        count = 0  # Time steps.
        total = 0.0
        squares = 0.0
        for audio_id in sorted(clips):
            store.check_current(audio_id, clips[audio_id])
            stored = store.read(audio_id)
            if stored is None:
                continue
            num_clips += 1
            features = stored.features.double()  # (layers, time, width)
            total = total + features.sum(1, True)
            squares = squares + features.square().sum(1, True)
            count += features.shape[1]
        if not count:
            raise ValueError(
                f"{self.feature_root} holds features of no clip of {self.standardize_on}."
            )
        print(f"mean and std of the features of {num_clips} of {len(clips)} clips")
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=1e-10)
        state["audio_tower.feature_mean"] = mean.float()  # (layers, 1, width)
        state["audio_tower.feature_std"] = variance.sqrt().float()

    def extractor_settings(self, is_original: bool) -> dict:
        """Return the arguments of `LtuAsFeatureExtractor`.

        Args:
            is_original: whether they are for a checkpoint of the original, which was trained on
                transcripts that were cleaned in another way.
        """
        settings = {
            "whisper_model": self.whisper,
            "transcription_model": self.transcription_model or TEXT_MODELS.get(self.whisper),
            "feature_precision": self.feature_precision,
        }
        if is_original:
            settings["transcript_rule"] = "original"
        extractor = LtuAsFeatureExtractor()
        extractor.num_tokens = self._num_audio_tokens()
        settings["time_pooling"] = extractor.time_pooling
        settings["loop_short_clips"] = self._describe_features().get("loop_short_clips", False)
        # A model with an official name may not be downloaded yet; its fingerprint is set at the
        # first use.
        if Path(self.whisper).is_file():
            extractor = LtuAsFeatureExtractor(None, None, self.whisper)
            settings["whisper_fingerprint"] = extractor.describe()["fingerprint"]
        return settings


CONVERTERS["ltu_as"] = LtuAsConverter
