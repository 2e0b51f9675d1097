"""Listen, Think, and Understand: an ear, a projection and a LoRA-adapted language model.

Importing this package registers its classes with the Auto classes of transformers and loads no weights.
"""

from ltu.configuration_ltu import CavMaeConfig, LtuConfig, YamnetConfig
from ltu.feature_extraction_ltu import LtuFeatureExtractor, YamnetFeatureExtractor
from ltu.modeling_cavmae import CavMaeModel
from ltu.modeling_ltu import LtuForConditionalGeneration
from ltu.modeling_yamnet import YamnetModel
from ltu.processing_ltu import LtuProcessor

__all__ = [
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
