"""Computes or reads Whisper's features of clips, and transcribes them."""

import logging
import os
import warnings
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ltu.data.audio import AudioClip, AudioError, AudioSource, load_audio
from ltu.models.audio_front_end import AudioFrontEnd, register_front_end
from ltu_as.feature_extraction_ltu_as import DOWNMIX, LtuAsFeatureExtractor
from ltu_as.feature_store import EXTRACT, FeatureError, FeatureStore, Stored

logger = logging.getLogger(__name__)

# Settings of the feature extractor that do not decide the features of a given Whisper.
TRANSCRIPT_SETTINGS = ("whisper_model", "transcription_model", "language", "transcript_rule")


class WhisperFrontEnd(AudioFrontEnd):
    """The audio front end of LTU-AS.

    The transcript "" stands for a clip without speech; such a clip is not transcribed. Whisper gets
    the mean of a clip's channels, as in the original.

    Stored features of audio that has changed since are never used. Inference computes them from
    the audio, with a warning for the first such clip; training refuses them, because a run would
    otherwise become slow without notice, and its numbers would be those of no one store.

    Attributes:
        store: the folder of stored features, or None.
        warned_of_stale: whether a warning has named a clip whose audio has changed.
    """

    transcribes = True
    downmix = DOWNMIX
    title = "LTU-AS (Whisper)"
    flags = {
        "whisper": "Another name or .pt file of the Whisper that computes features.",
        "transcription_model": "Another Whisper for the transcripts.",
        "feature_precision": "Precision of Whisper's encoder, fp16 or fp32. The default is that of "
        "the checkpoint.",
        "feature_root": "A folder of stored features, by ltu_as.extract_whisper_feature, or of the "
        "original's .npz files.",
    }
    dataset_flags = ("feature_root",)
    place_flags = ("feature_root", "whisper")  # The checkpoint has the fingerprint of Whisper.
    feature_extractor: LtuAsFeatureExtractor
    store: FeatureStore | None = None
    warned_of_stale = False

    def configure(
        self,
        feature_root: str | None = None,
        feature_precision: str | None = None,
        whisper: str | None = None,
        transcription_model: str | None = None,
    ) -> None:
        """Change the Whisper models, their precision or the feature folder.

        A precision other than that of the training is used, with a warning.

        Args:
            feature_root: folder of `ltu_as.extract_whisper_feature`, or of the original's `.npz`
                files.
            feature_precision: "fp16" or "fp32", of Whisper's encoder.
            whisper, transcription_model: another name or `.pt` file of the same models.

        Raises:
            ValueError: the features in the folder are of another Whisper.
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
            stored_precision = self.store.description.get("feature_precision")
            if feature_precision and stored_precision and feature_precision != stored_precision:
                raise ValueError(
                    f"--feature_precision {feature_precision}, but the features in {feature_root} "
                    f"are of {stored_precision}. Leave the flag out, or extract the features again."
                )
            feature_precision = feature_precision or stored_precision
        if feature_precision not in (None, extractor.feature_precision):
            warnings.warn(
                f"This checkpoint was made with features of {extractor.feature_precision}, now "
                f"they are of {feature_precision}: answers may be a little worse. Use "
                f"--feature_precision {extractor.feature_precision}, or features extracted with "
                "it.",
                stacklevel=2,
            )
            extractor.feature_precision = feature_precision

    def _check_store(self, description: dict, shape: list[int]) -> None:
        """Check that stored features are those of the checkpoint's Whisper.

        Args:
            description: of the feature store; empty for a folder of the original.
            shape: (layers, time, width) of the features that the checkpoint needs.

        Raises:
            ValueError: the features are of another Whisper.
        """
        extractor = self.feature_extractor
        own_name = os.path.basename(extractor.whisper_model)
        own_fingerprint = extractor.whisper_fingerprint
        stored_name = description.get("whisper_model")
        stored_fingerprint = description.get("fingerprint")
        # Compare names if a fingerprint is missing: a checkpoint made from an official name gets
        # its fingerprint only at its first use.
        if own_fingerprint and stored_fingerprint:
            is_other = own_fingerprint != stored_fingerprint
        else:
            is_other = own_name != stored_name
        if description and (description["shape"] != shape or is_other):
            raise ValueError(
                f"The features in {self.store.folder} are of Whisper {stored_name} (fingerprint "
                f"{str(stored_fingerprint)[:12]}, shape {description['shape']}), the checkpoint's "
                f"of {own_name} ({str(own_fingerprint)[:12]}, {shape}). Extract them again: "
                "python -m ltu_as.extract_whisper_feature --model DIR"
            )
        # The original pads clips.
        stored_loops = bool(description.get("loop_short_clips"))
        if stored_loops != extractor.loop_short_clips:
            treatments = {True: "repeats clips shorter than a chunk", False: "pads them"}
            raise ValueError(
                f"The extraction of the features in {self.store.folder} "
                f"{treatments[stored_loops]}; that of the checkpoint "
                f"{treatments[extractor.loop_short_clips]}. Extract them again: "
                "python -m ltu_as.extract_whisper_feature --model DIR"
            )
        if description and description.get("channels") != DOWNMIX:
            warnings.warn(
                f"The features in {self.store.folder} are those of the first channel of each clip; "
                "an older version extracted them. Now they are of the mean of all channels, as in "
                "the original. If clips have several channels, extract the features again into "
                "another folder: python -m ltu_as.extract_whisper_feature --model DIR",
                stacklevel=3,
            )
        extractor.whisper_fingerprint = own_fingerprint or stored_fingerprint

    @property
    def settings(self) -> tuple:
        """The Whisper models, language, precision, downmix, and the feature folder."""
        extractor = self.feature_extractor
        return (
            extractor.whisper_model,
            extractor.transcription_model,
            extractor.language,
            extractor.transcript_rule,
            extractor.feature_precision,
            DOWNMIX,
            self.store and self.store.folder,
        )

    @property
    def needs_gpu(self) -> bool:
        """Whether Whisper computes features on a GPU."""
        return self.store is None and self.feature_extractor.device.type == "cuda"

    @property
    def is_exact(self) -> bool:
        """Whether Whisper computes in fp32; on a CPU it always does."""
        extractor = self.feature_extractor
        return extractor.device.type != "cuda" or extractor.feature_precision == "fp32"

    def to(self, device: str | torch.device) -> None:
        """Move Whisper to a device."""
        self.feature_extractor.device = device

    def find_stored_features(
        self, audio: AudioSource, audio_id: str | None = None
    ) -> Stored | None:
        """Return what the feature folder holds of a clip, or None.

        Features of other audio than that of the clip are not returned.

        Raises:
            ltu.data.audio.AudioError: its file in the feature folder is damaged.
        """
        if self.store is None or not audio_id:
            return None
        if self.store.is_stale(audio_id, audio):
            if not self.warned_of_stale:
                logger.warning(
                    "%s: the audio has changed since its features were stored in %s. They are "
                    "computed from the audio. Further such clips are not reported. To store them "
                    "again: %s",
                    audio_id,
                    self.store.folder,
                    EXTRACT,
                )
            self.warned_of_stale = True
            return None
        try:
            stored = self.store.read(audio_id)
            if stored is None and self.store.is_original:
                # The original names features by the path in the example, which may be whole here.
                stored = self.store.read(str(audio))
        except FeatureError as error:
            raise AudioError(str(audio_id), "damaged", str(error)) from error
        return stored

    def load_clip(
        self, audio: AudioSource, audio_id: str | None = None, num_chunks: int = 1
    ) -> AudioClip:
        """Load a clip, from the feature folder if it is there.

        The folder holds only the first chunk of a clip, so a clip of which more chunks are needed
        is decoded. Arguments and errors are those of `AudioFrontEnd.load_clip`.
        """
        stored = self.find_stored_features(audio, audio_id) if num_chunks == 1 else None
        if stored is None:
            return super().load_clip(audio, num_chunks=num_chunks)
        # The original's files do not say how long a clip is.
        seconds = self.feature_extractor.chunk_seconds if stored.seconds is None else stored.seconds
        return AudioClip(
            audio,
            seconds,
            features=stored.features,
            transcript=stored.transcript,
            is_cut_short=stored.is_cut_short,
            warnings=stored.warnings,
        )

    def load_features(self, example: dict) -> Tensor:
        """Return the input of the audio encoder for training: (layers, time, width).

        Raises:
            ltu_as.feature_store.StaleFeatures: the stored features are those of other audio.
        """
        self._check_current(example["audio"], example.get("audio_id"))
        return super().load_features(example)

    def find_source(self, example: dict) -> str:
        """Return the path of the stored features of a clip, or of its audio if there are none.

        Raises:
            ltu_as.feature_store.StaleFeatures: the stored features are those of other audio.
        """
        audio = example["audio"]
        audio_id = example.get("audio_id")
        self._check_current(audio, audio_id)
        if self.store is None or not audio_id:
            return audio
        path = self.store.find_file(audio_id)
        if path is None and self.store.is_original:
            path = self.store.find_file(str(audio))
        return audio if path is None else str(path)

    def describe_features(self) -> dict[str, Any]:
        """Return all that decides the features of a given source.

        Whisper is loaded if its fingerprint is not known.
        """
        extractor = self.feature_extractor
        fingerprint = extractor.whisper_fingerprint or extractor.describe()["fingerprint"]
        settings = super().describe_features()
        # Names of the same Whisper differ between machines, and transcripts are no features.
        for name in TRANSCRIPT_SETTINGS:
            settings.pop(name, None)
        return settings | {"whisper_fingerprint": fingerprint, "device": extractor.device.type}

    def _check_current(self, audio: AudioSource, audio_id: str | None) -> None:
        """Check that the feature folder holds no features of other audio for a clip."""
        if self.store is not None and audio_id:
            self.store.check_current(audio_id, audio)

    def extract_features(self, clips: list[AudioClip]) -> Tensor:
        """Return the input of the audio encoder: (chunks of all clips, layers, time, width).

        Raises:
            ltu.data.audio.AudioError: the features of a clip are not finite.
        """
        features = super().extract_features(clips)  # (chunks, layers, time, width)
        if not torch.isfinite(features).all():
            parts = features.split([clip.num_chunks for clip in clips])
            names = [
                str(clip.source)
                for clip, part in zip(clips, parts, strict=True)
                if not torch.isfinite(part).all()
            ]
            raise AudioError(
                ", ".join(names[:3]),
                "unreadable",
                "Whisper's features overflow in fp16 (fp32 may help)",
            )
        return features

    def complete_transcripts(
        self, clips: list[AudioClip | None], transcripts: list[str | None]
    ) -> list[str]:
        """Replace each transcript that is None by Whisper's, or by "" if there is no clip."""
        # Collect the clips that Whisper must transcribe; a clip may occur more than once.
        new_clips: dict[int, AudioClip] = {}
        for clip, text in zip(clips, transcripts, strict=True):
            if text is None and clip is not None and clip.transcript is None:
                new_clips[id(clip)] = clip
        if new_clips:
            waveforms = [
                load_audio(clip.source, DOWNMIX) if clip.waveform is None else clip.waveform
                for clip in new_clips.values()
            ]
            texts = self.feature_extractor.transcribe(waveforms)
            for clip, text in zip(new_clips.values(), texts, strict=True):
                clip.transcript = text

        completed = []
        for clip, text in zip(clips, transcripts, strict=True):
            if text is None:
                text = clip.transcript if clip else ""
            completed.append(text)
        return completed

    def add_transcripts(
        self,
        examples: list[dict],
        errors: dict[str, AudioError] | None = None,
        batch_size: int = 16,
    ) -> list[dict]:
        """Return examples for training with Whisper's transcript as `input` where it is absent.

        The example of a clip that cannot be decoded gets "".

        Args:
            errors: gets the error of each such clip, by path.
            batch_size: clips that are transcribed at once.

        Raises:
            ltu_as.feature_store.StaleFeatures: a stored transcript is that of other audio.
        """
        audio_ids = {}  # By path, of the clips without a transcript.
        for example in examples:
            if example.get("input") is None and example["audio"]:
                audio_ids[example["audio"]] = example.get("audio_id")
        paths = list(audio_ids)
        transcripts: dict[str, str] = {}
        for start in tqdm(
            range(0, len(paths), batch_size), desc="transcripts", unit="batch", disable=not paths
        ):
            clips: dict[str, AudioClip] = {}
            for path in paths[start : start + batch_size]:
                self._check_current(path, audio_ids[path])
                try:
                    clip = self.load_clip(path, audio_ids[path])
                    if clip.transcript is None and clip.waveform is None:
                        # Stored features without a transcript: the clip must be decoded.
                        clip = super().load_clip(path)
                except AudioError as error:
                    if errors is not None:
                        errors[path] = error
                    continue
                clips[path] = clip
            texts = self.complete_transcripts(list(clips.values()), [None] * len(clips))
            transcripts |= dict(zip(clips, texts, strict=True))

        completed = []
        for example in examples:
            if example.get("input") is None:
                example = example | {"input": transcripts.get(example["audio"], "")}
            completed.append(example)
        return completed


register_front_end(LtuAsFeatureExtractor, WhisperFrontEnd)
