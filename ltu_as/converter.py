"""Makes checkpoint folders of LTU-AS from original files and pretrained components."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ltu.checkpoints.convert import CONVERTERS, AudioEncoderParts, LtuConverter
from ltu.checkpoints.original_checkpoints import KeyRule
from ltu_as.configuration_ltu_as import LtuAsConfig, TltrConfig
from ltu_as.feature_extraction_ltu_as import TEXT_MODELS, LtuAsFeatureExtractor
from ltu_as.processing_ltu_as import LtuAsProcessor
from ltu_as.tltr_file import Pretraining

TLTR_KEYS = [
    KeyRule(r"((?:time|layer)_tr\..+)", r"audio_tower.\1"),
    KeyRule(r"(feature_(?:mean|std))", r"audio_tower.\1"),  # Of ltu_as.pretrain_tltr.
    KeyRule(r"mlp_layer\..+", drop="the classifier of TLTR's pretraining"),
    KeyRule(
        r"down_layer\..+",
        refuse="a 'low' Whisper-AT has a layer that LTU-AS lacks, and is 512 wide; use 'ori'",
    ),
]
# Attention heads of the released TLTRs.
DEFAULT_HEADS = {
    name: getattr(TltrConfig(), name) for name in ("num_time_heads", "num_layer_heads")
}


@dataclass
class LtuAsConverter(LtuConverter):
    """Makes checkpoint folders of LTU-AS.

    Attributes:
        whisper: the Whisper of the features, a name or an openai-whisper `.pt` file.
        transcription_model: the Whisper of the transcripts.
        feature_precision: of Whisper's encoder, "fp16" or "fp32".
        num_time_heads, num_layer_heads: attention heads of TLTR, which a file of Whisper-AT does
            not state.
        pretraining: of the TLTR in a file of `ltu_as.pretrain_tltr`, set when the file is loaded.
            The checkpoint gets the settings of its features.
    """

    config_class: ClassVar[type[LtuAsConfig]] = LtuAsConfig
    processor_class: ClassVar[type[LtuAsProcessor]] = LtuAsProcessor
    audio_encoder_keys: ClassVar[list[KeyRule]] = TLTR_KEYS
    takes_other_encoders: ClassVar[bool] = False

    whisper: str = "large-v1"
    transcription_model: str | None = None
    feature_precision: str | None = None
    num_time_heads: int | None = None
    num_layer_heads: int | None = None
    pretraining: Pretraining | None = field(default=None, init=False)

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
            choices=("fp16", "fp32"),
            help="The precision of Whisper's encoder. The default is that of the features with "
            "which TLTR was pretrained, and else fp16.",
        )
        for name, number in DEFAULT_HEADS.items():
            part = name.split("_")[1]
            parser.add_argument(
                f"--{name}",
                type=int,
                help=f"The attention heads of TLTR over {part}. The default is that of a file of "
                f"ltu_as.pretrain_tltr, and else {number}.",
            )

    def _load_built_in(self, path: str | Path | None) -> AudioEncoderParts:
        """Return TLTR; if the file says how it was trained, remember that."""
        if path is not None and Path(path).is_file():
            self.pretraining = Pretraining.read(path)
        return super()._load_built_in(path)

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
        if self.pretraining is not None:
            self._check_pretraining([layers, width])
        return TltrConfig(
            hidden_size=width,
            num_whisper_layers=layers,
            num_audio_tokens=self._num_audio_tokens(),
            standardize="audio_tower.feature_mean" in state,
            **{name: self._setting(name, number) for name, number in DEFAULT_HEADS.items()},
        )

    def _check_pretraining(self, sizes: list[int]) -> None:
        """Check that TLTR was trained with features of the Whisper.

        Args:
            sizes: layers and width of the Whisper.

        Raises:
            ValueError: it was not.
        """
        features = self.pretraining.features
        layers, _, width = features["shape"]
        trained_with = features.get("whisper_model", "of an unknown name")
        if Path(self.whisper).is_file():
            is_same = features.get("fingerprint", self._fingerprint()) == self._fingerprint()
        else:
            # A model with an official name may not be downloaded yet.
            is_same = features.get("whisper_model", self.whisper) == self.whisper
        if not is_same or [layers, width] != sizes:
            raise ValueError(
                f"TLTR was trained with the features of Whisper {trained_with} ({layers} layers of "
                f"width {width}), not with those of {self.whisper}. Name that Whisper: --whisper"
            )

    def _setting(self, name: str, default: Any) -> Any:
        """Return a setting that the flags or the pretraining of TLTR may give.

        Raises:
            ValueError: they contradict each other.
        """
        given = getattr(self, name)
        stated: dict[str, Any] = {}
        if self.pretraining is not None:
            stated = self.pretraining.features | vars(self.pretraining)
        trained_with = stated.get(name)
        if given is None:
            return default if trained_with is None else trained_with
        if trained_with not in (None, given):
            raise ValueError(f"--{name} {given}, but TLTR was trained with {trained_with}.")
        return given

    def _num_audio_tokens(self) -> int:
        """Return the time steps of the features of the pretraining, or those of the original."""
        if self.pretraining is None:
            return TltrConfig().num_audio_tokens
        return self.pretraining.features["shape"][1]

    def _fingerprint(self) -> str:
        return LtuAsFeatureExtractor(None, None, self.whisper).describe()["fingerprint"]

    def extractor_settings(self, is_original: bool) -> dict:
        """Return the arguments of `LtuAsFeatureExtractor`.

        Args:
            is_original: whether they are for a checkpoint of the original, which was trained on
                transcripts that were cleaned in another way.
        """
        settings = {
            "whisper_model": self.whisper,
            "transcription_model": self.transcription_model or TEXT_MODELS.get(self.whisper),
            "feature_precision": self._setting("feature_precision", "fp16"),
        }
        if is_original:
            settings["transcript_rule"] = "original"
        extractor = LtuAsFeatureExtractor()
        extractor.num_tokens = self._num_audio_tokens()
        settings["time_pooling"] = extractor.time_pooling
        features = {} if self.pretraining is None else self.pretraining.features
        settings["loop_short_clips"] = features.get("loop_short_clips", False)
        # A model with an official name may not be downloaded yet; its fingerprint is set at the
        # first use.
        if Path(self.whisper).is_file():
            settings["whisper_fingerprint"] = self._fingerprint()
        return settings


CONVERTERS["ltu_as"] = LtuAsConverter
