"""Makes checkpoint folders of LTU-AS from original files and pretrained components."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ltu.checkpoints.convert import CONVERTERS, LtuConverter
from ltu.checkpoints.original_checkpoints import KeyRule
from ltu_as.configuration_ltu_as import LtuAsConfig, TltrConfig
from ltu_as.feature_extraction_ltu_as import TEXT_MODELS, LtuAsFeatureExtractor
from ltu_as.feature_store import FeatureStore
from ltu_as.processing_ltu_as import LtuAsProcessor

TLTR_KEYS = [
    KeyRule(r"((?:time|layer)_tr\..+)", r"audio_tower.\1"),
    KeyRule(r"(feature_(?:mean|std))", r"audio_tower.\1"),  # Of ltu_as.pretrain_tltr.
    KeyRule(r"mlp_layer\..+", drop="the classifier of TLTR's pretraining"),
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
        feature_root: a folder of features. The number of audio tokens, and whether short clips are
            repeated, are those of these features.
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
            help="A folder of features, whose number of audio tokens and treatment of short clips "
            "the checkpoint gets.",
        )
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
            ValueError: the weights are for another Whisper.
        """
        layers, width = LtuAsFeatureExtractor.shape_of(self.whisper)
        query = state.get("audio_tower.time_tr.attn.query.weight")
        if state and len(query) != width:
            raise ValueError(
                f"The file holds a TLTR of width {len(query)}, but Whisper {self.whisper} has "
                f"features of width {width}. Name the Whisper that TLTR was trained with: --whisper"
            )
        mean = state.get("audio_tower.feature_mean")  # (layers, 1, width)
        if mean is not None and len(mean) != layers:
            raise ValueError(
                f"The file holds a TLTR for {len(mean)} layers, but Whisper {self.whisper} has "
                f"{layers}. Name the Whisper that TLTR was trained with: --whisper"
            )
        return TltrConfig(
            hidden_size=width,
            num_whisper_layers=layers,
            num_audio_tokens=self._num_audio_tokens(),
            num_time_heads=self.num_time_heads,
            num_layer_heads=self.num_layer_heads,
            standardize=mean is not None,
        )

    def _describe_features(self) -> dict[str, Any]:
        """Return the settings of the features in `feature_root`, if it is given and states them."""
        return FeatureStore(self.feature_root).description if self.feature_root else {}

    def _num_audio_tokens(self) -> int:
        """Return the time steps of the features in `feature_root`; by default the original's."""
        shape = self._describe_features().get("shape")  # (layers, time, width)
        return shape[1] if shape else TltrConfig().num_audio_tokens

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
