"""Provides LTU-AS (Joint Audio and Speech Understanding) as Hugging Face classes.

LTU-AS is LTU with the layers of Whisper's encoder as audio input, and Whisper's transcript in the
prompt. Importing this package registers its classes with the Auto classes of transformers, and
loads no weights.
"""

from ltu_as.configuration_ltu_as import LtuAsConfig, TltrConfig
from ltu_as.converter import LtuAsConverter
from ltu_as.feature_extraction_ltu_as import LtuAsFeatureExtractor
from ltu_as.modeling_ltu_as import LtuAsForConditionalGeneration
from ltu_as.modeling_tltr import TltrModel
from ltu_as.processing_ltu_as import LtuAsProcessor

__all__ = [
    "LtuAsConfig",
    "LtuAsConverter",
    "LtuAsFeatureExtractor",
    "LtuAsForConditionalGeneration",
    "LtuAsProcessor",
    "TltrConfig",
    "TltrModel",
]
