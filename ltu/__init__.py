"""Provides LTU (Listen, Think, and Understand) as Hugging Face classes.

The model consists of an audio encoder, a projector and a language model with LoRA. Importing this
package registers its classes with the Auto classes of transformers, and loads no weights.
"""

from ltu.models.configuration_audio_encoder_wrapper import AudioEncoderWrapperConfig
from ltu.models.configuration_ltu import CavMaeConfig, LtuConfig, YamnetConfig
from ltu.models.feature_extraction_audio_encoder_wrapper import (
    AudioEncoderWrapperFeatureExtractor,
)
from ltu.models.feature_extraction_ltu import LtuFeatureExtractor, YamnetFeatureExtractor
from ltu.models.modeling_audio_encoder_wrapper import AudioEncoderWrapperModel
from ltu.models.modeling_cavmae import CavMaeModel
from ltu.models.modeling_ltu import LtuForConditionalGeneration
from ltu.models.modeling_yamnet import YamnetModel
from ltu.models.processing_ltu import LtuProcessor

__all__ = [
    "AudioEncoderWrapperConfig",
    "AudioEncoderWrapperFeatureExtractor",
    "AudioEncoderWrapperModel",
    "CavMaeConfig",
    "CavMaeModel",
    "LtuConfig",
    "LtuFeatureExtractor",
    "LtuForConditionalGeneration",
    "LtuProcessor",
    "YamnetConfig",
    "YamnetFeatureExtractor",
    "YamnetModel",
]
