"""What LTU-AS does with a clip before its ear: features of Whisper's layers, computed or stored, and a transcript."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoFeatureExtractor, AutoProcessor

from ltu.data.audio import AudioClip, AudioError, AudioSource, load_audio
from ltu.models.checkpoint_folder import relative_path_of
from ltu.models.processing_ltu import LtuProcessor
from ltu_as.configuration_ltu_as import LtuAsConfig, TltrConfig
from ltu_as.feature_extraction_ltu_as import LtuAsFeatureExtractor
from ltu_as.feature_store import FeatureError, FeatureStore, Stored

MODELS = ("whisper_model", "transcription_model")  # Settings of the extractor that may be files.


class LtuAsProcessor(LtuProcessor):
    """`LtuProcessor` with Whisper: where no transcript is given it writes one; "" says that there is none.

    Args:
        feature_extractor: `LtuAsFeatureExtractor`; others as for `LtuProcessor`.
    """

    extractor_sizes = {"num_layers": "num_whisper_layers", "hidden_size": "hidden_size"}
    store: FeatureStore | None = None
    transcribes = True

    def use(
        self,
        feature_root: str | None = None,
        feature_precision: str | None = None,
        whisper: str | None = None,
        transcription_model: str | None = None,
    ) -> None:
        """Change what the model hears with. Another precision than it was trained with is a warning, and is kept.

        Args:
            feature_root: folder of `ltu_as.extract_whisper_feature`, or of the original's `.npz` files.
            feature_precision: "fp16" or "fp32", of Whisper's encoder.
            whisper, transcription_model: the same models in another place, each a name or a `.pt` file.

        Raises:
            ValueError: the store's features are another Whisper's.
        """
        extractor = self.feature_extractor
        if feature_precision not in (None, "fp16", "fp32"):
            raise ValueError(f"--feature_precision is fp16 or fp32, not {feature_precision!r}.")
        extractor.whisper_model = whisper or extractor.whisper_model
        extractor.transcription_model = transcription_model or extractor.transcription_model
        if feature_root is not None:
            shape = [extractor.num_layers, extractor.num_tokens, extractor.hidden_size]
            self.store = FeatureStore(feature_root, shape)
            self._check_store(self.store.description, shape)
            theirs = self.store.description.get("feature_precision")
            if feature_precision and theirs and feature_precision != theirs:
                raise ValueError(
                    f"--feature_precision {feature_precision}, but the features in {feature_root} are of {theirs}. "
                    "Leave the flag out, or extract them anew."
                )
            feature_precision = feature_precision or theirs
        if feature_precision not in (None, extractor.feature_precision):
            warnings.warn(
                f"This checkpoint was made with features of {extractor.feature_precision}, now they are of "
                f"{feature_precision}: answers may be a little worse. Use --feature_precision "
                f"{extractor.feature_precision}, or features extracted with it.",
                stacklevel=2,
            )
            extractor.feature_precision = feature_precision

    def _check_store(self, store: dict, shape: list[int]) -> None:
        extractor = self.feature_extractor
        names = os.path.basename(extractor.whisper_model), store.get("whisper_model")
        prints = extractor.whisper_fingerprint, store.get("fingerprint")
        # A checkpoint made from an official name knows no fingerprint before its first use.
        differ = prints[0] != prints[1] if all(prints) else names[0] != names[1]
        if store and (store["shape"] != shape or differ):
            raise ValueError(
                f"The features in {self.store.folder} are of Whisper {names[1]} (fingerprint {str(prints[1])[:12]}, "
                f"shape {store['shape']}), the checkpoint's of {names[0]} ({str(prints[0])[:12]}, {shape}). Extract "
                "them anew: python -m ltu_as.extract_whisper_feature --model DIR"
            )
        extractor.whisper_fingerprint = prints[0] or prints[1]

    @property
    def audio_settings(self) -> tuple:
        """Its Whispers, their precision, and the feature folder."""
        extractor = self.feature_extractor
        models = extractor.whisper_model, extractor.transcription_model, extractor.language
        return *models, extractor.feature_precision, self.store and self.store.folder

    def stored(self, audio: AudioSource, audio_id: str | None = None) -> Stored | None:
        """What the feature folder holds of a clip.

        Raises:
            ltu.data.audio.AudioError: its file there is damaged.
        """
        if self.store is None or not audio_id:
            return None
        try:
            stored = self.store.read(audio_id)
            if (
                stored is None and self.store.is_original
            ):  # Named by the whole path, or by what is in the row.
                stored = self.store.read(str(audio))
        except FeatureError as error:
            raise AudioError(str(audio_id), "damaged", str(error)) from error
        return stored

    def load_clip(
        self, audio: AudioSource, audio_id: str | None = None, num_chunks: int = 1
    ) -> AudioClip:
        """A clip, from the feature folder if that holds it; `LtuProcessor.load_clip` says what is raised.

        The folder holds a clip's first chunk only, so more of them are made from its sound.
        """
        stored = self.stored(audio, audio_id) if num_chunks == 1 else None
        if stored is None:
            return super().load_clip(audio, num_chunks=num_chunks)
        seconds = self.feature_extractor.chunk_seconds if stored.seconds is None else stored.seconds
        return AudioClip(audio, seconds, features=stored.features, transcript=stored.transcript)

    def extract_features(self, clips: list[AudioClip]) -> Tensor:
        """What the ear takes: (clips, layers, time, width)."""
        features = super().extract_features(clips)
        if not torch.isfinite(features).all():
            parts = zip(clips, features.split([clip.num_chunks for clip in clips]), strict=True)
            names = [str(clip.source) for clip, own in parts if not torch.isfinite(own).all()]
            raise AudioError(
                ", ".join(names[:3]),
                "unreadable",
                "Whisper's features overflow in fp16 (fp32 may help)",
            )
        return features

    def complete_transcripts(
        self, clips: list[AudioClip | None], transcripts: list[str | None]
    ) -> list[str]:
        """Whisper's transcript for each clip that has None. A question without a clip has none."""
        pairs = list(zip(clips, transcripts, strict=True))
        todo = {
            id(c): c for c, text in pairs if text is None and c is not None and c.transcript is None
        }.values()
        if todo:
            waveforms = [
                load_audio(clip.source) if clip.waveform is None else clip.waveform for clip in todo
            ]
            for clip, text in zip(todo, self.feature_extractor.transcribe(waveforms), strict=True):
                clip.transcript = text
        return [(clip.transcript if clip else "") if text is None else text for clip, text in pairs]

    def add_transcripts(self, rows: list[dict], batch_size: int = 16) -> list[dict]:
        """Rows with `input`: as it is, or Whisper's transcript where it is absent. A clip that cannot be heard has
        none; training skips and counts it."""
        wanted = {
            row["audio"]: row.get("audio_id")
            for row in rows
            if row.get("input") is None and row["audio"]
        }
        texts: dict[str, str] = {}
        names = list(wanted)
        for start in tqdm(
            range(0, len(names), batch_size), desc="transcripts", unit="batch", disable=not names
        ):
            clips = {}
            for audio in names[start : start + batch_size]:
                try:
                    clip = self.load_clip(audio, wanted[audio])
                    has_words = clip.transcript is not None or clip.waveform is not None
                    clips[audio] = clip if has_words else super().load_clip(audio)
                except AudioError:
                    continue
            texts |= dict(
                zip(
                    clips,
                    self.complete_transcripts(list(clips.values()), [None] * len(clips)),
                    strict=True,
                )
            )
        return [
            row | {"input": texts.get(row["audio"], "")} if row.get("input") is None else row
            for row in rows
        ]

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the stock method; where features lie is not part of a processor."""
        return {
            name: value
            for name, value in super().to_dict(*args, **kwargs).items()
            if name != "store"
        }

    # Where the weights of Whisper lie is written relative to the folder, so that both can move together.

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        """As the stock method, the places of Whisper's files relative to the folder."""
        extractor = self.feature_extractor
        kept = {name: getattr(extractor, name) for name in MODELS}
        try:
            for name, place in kept.items():
                if place is not None and Path(place).is_file():
                    setattr(extractor, name, relative_path_of(place, save_directory))
            return super().save_pretrained(save_directory, **kwargs)
        finally:
            for name, place in kept.items():
                setattr(extractor, name, place)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> "LtuAsProcessor":
        """As the stock method."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        for name in MODELS:
            place = getattr(processor.feature_extractor, name)
            if place is not None and place.startswith("."):
                setattr(
                    processor.feature_extractor,
                    name,
                    str((Path(pretrained_model_name_or_path) / place).resolve()),
                )
        return processor


AutoFeatureExtractor.register(TltrConfig, LtuAsFeatureExtractor)
AutoProcessor.register(LtuAsConfig, LtuAsProcessor)
