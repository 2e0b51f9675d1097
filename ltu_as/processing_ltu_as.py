"""Prepares prompts and clips for LTU-AS."""

from pathlib import Path
from typing import Any

from transformers import AutoFeatureExtractor, AutoProcessor

import ltu_as.audio_front_end  # noqa: F401  registers the front end of the feature extractor
from ltu.models.config_checks import show
from ltu.models.locate_checkpoint import relative_path_of
from ltu.models.processing_ltu import LtuProcessor
from ltu_as.configuration_ltu_as import LtuAsConfig, TltrConfig
from ltu_as.feature_extraction_ltu_as import LtuAsFeatureExtractor

# Settings of the feature extractor that may be paths of files.
MODELS = ("whisper_model", "transcription_model")


class LtuAsProcessor(LtuProcessor):
    """`LtuProcessor` with Whisper, which transcribes each clip that is given without a transcript.

    Args:
        feature_extractor: an `LtuAsFeatureExtractor`; other arguments as for `LtuProcessor`.
    """

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        """Write the files of the processor.

        The paths of Whisper's files are written relative to the folder, so that both can be moved
        together.
        """
        extractor = self.feature_extractor
        models = {name: getattr(extractor, name) for name in MODELS}
        try:
            for name, model in models.items():
                if model is not None and Path(model).is_file():
                    setattr(extractor, name, relative_path_of(model, save_directory))
            return super().save_pretrained(save_directory, **kwargs)
        finally:
            for name, model in models.items():
                setattr(extractor, name, model)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> "LtuAsProcessor":
        """Open a processor, and resolve the relative paths of Whisper's files."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        extractor = processor.feature_extractor
        for name in MODELS:
            model = getattr(extractor, name)
            if not isinstance(model, str | None):
                raise ValueError(
                    f"{pretrained_model_name_or_path}: {name} is {show(model)}; possible: the name "
                    "of a Whisper, or the path of its file."
                )
            if model is not None and model.startswith("."):
                path = Path(pretrained_model_name_or_path) / model
                setattr(extractor, name, str(path.resolve()))
        return processor


AutoFeatureExtractor.register(TltrConfig, LtuAsFeatureExtractor)
AutoProcessor.register(LtuAsConfig, LtuAsProcessor)
