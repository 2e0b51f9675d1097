"""Tests the spoken clips of the toy dataset, and their examples for LTU-AS."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.toy import build, speech_examples
from data.toy.attribution import write_speech_attribution
from data.toy.render_speech import ABOUT, KOKORO, KOKORO_VOICES, plan_utterances
from data.toy.sound_clips import AUDIO, read_fold, read_json, read_manifest
from data.toy.speech_clips import (
    PEAK,
    RATE,
    SPEECH,
    cut_offs,
    median_f0,
    name_of,
    pitch_and_speed,
    read_speech,
    spoken_span,
    syllables,
)
from eval import toy_speech
from ltu.data.audio import load_audio
from ltu.data.check_examples import read_examples
from ltu_as.feature_extraction_ltu_as import DOWNMIX, LtuAsFeatureExtractor

CLIPS = read_speech()
BY_FILE = {clip["file"]: clip for clip in CLIPS}
TRAIN, TEST = ([clip for clip in CLIPS if clip["split"] == split] for split in ("train", "test"))
TEST_VOICES = {"slt_hts", "awb", "kal", "af_heart", "am_fenrir", "bf_emma", "bm_fable"}
HELD_OUT = [
    "gender",
    "gender_empty",
    "words_right",
    "words_whisper",
    "words_wrong",
    "words_none",
    "pitch",
    "speed",
]
FIELDS = {
    "file",
    "text",
    "voice",
    "speaker",
    "gender",
    "split",
    "speed",
    "pitch",
    "f0_hz",
    "syllables_per_second",
}
FIELDS |= {"seconds", "package", "licence", "author", "transcript_check"}


SMALL = build.Sizes([100, 150, 200], crops=1, mixtures=2, pairs=2, versions=2)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy_as") / "fold0"
    build.build(build.BuildSettings("ltu_as", folder, SMALL))
    return folder


def load(folder: Path, name: str):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def plain(text: str) -> str:
    text = text.removeprefix(speech_examples.QUESTIONS["closed_prefix"])
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def spoken_examples(folder: Path, *stages: int) -> list[dict]:
    examples = [
        example for stage in stages or (1, 2, 3) for example in load(folder, f"stage{stage}")
    ]
    return [example for example in examples if example["dataset"] == speech_examples.DATASET]


# The committed clips


def test_manifest_and_files_agree():
    assert sorted(BY_FILE) == sorted(path.name for path in SPEECH.glob("*.flac"))
    assert len(CLIPS) == 325
    assert sum(path.stat().st_size for path in SPEECH.glob("*.flac")) < 10e6
    for clip in CLIPS:
        info = soundfile.info(SPEECH / clip["file"])
        assert (info.samplerate, info.channels, info.subtype) == (RATE, 1, "PCM_16"), clip["file"]
        assert abs(info.duration - clip["seconds"]) < 0.01, clip["file"]
        assert 1.1 < info.duration < 10, clip["file"]
        assert set(clip) - {"source_file", "command"} == FIELDS, clip["file"]
        assert all(clip[key] for key in FIELDS), clip["file"]
        assert ("source_file" in clip) != ("command" in clip)
        assert len(clip["text"].split()) >= 4
    assert not re.search(
        r"/(work|home|tmp|root)/", (SPEECH / "manifest.jsonl").read_text(encoding="utf-8")
    )


def test_every_clip_has_the_same_band_and_peak():
    for clip in CLIPS:
        waveform, _ = soundfile.read(SPEECH / clip["file"])
        assert abs(np.abs(waveform).max() - PEAK) < 1e-3, clip["file"]
        power = np.abs(np.fft.rfft(waveform)) ** 2
        frequencies = np.fft.rfftfreq(len(waveform), 1 / RATE)
        assert power[(frequencies < 25) | (frequencies > 3650)].sum() < 1e-4 * power.sum(), clip[
            "file"
        ]


def test_pitch_and_speed_are_what_the_rule_says():
    cuts = cut_offs(CLIPS)
    for clip in CLIPS:
        waveform, _ = soundfile.read(SPEECH / clip["file"])
        start, end = spoken_span(waveform)
        assert median_f0(waveform) == pytest.approx(clip["f0_hz"], abs=0.1), clip["file"]
        assert syllables(clip["text"]) * RATE / (end - start) == pytest.approx(
            clip["syllables_per_second"], abs=0.01
        )
        assert (clip["pitch"], clip["speed"]) == pitch_and_speed(clip, 1.0, cuts)
    for key in ("pitch", "speed"):  # Thirds: no answer is frequent.
        assert max(Counter(clip[key] for clip in TRAIN).values()) < 0.4 * len(TRAIN)
    for voice in {clip["voice"] for clip in TRAIN}:  # The voice alone does not reveal the speed.
        assert len({clip["speed"] for clip in TRAIN if clip["voice"] == voice}) >= 2, voice
    for gender in ("female", "male"):  # Nor does the pitch reveal the gender.
        pitches = {clip["pitch"] for clip in TRAIN if clip["gender"] == gender}
        assert pitches == {"low", "medium", "high"}


@pytest.mark.parametrize("pitch", [80.0, 125.0, 210.0])
def test_pitch_of_a_known_tone(pitch):
    phase = 2 * np.pi * pitch * np.arange(RATE) / RATE
    assert median_f0(sum(np.sin(k * phase) / k for k in range(1, 8))) == pytest.approx(
        pitch, rel=0.02
    )


def test_noise_has_no_pitch():
    with pytest.raises(ValueError, match="no pitch"):
        median_f0(np.random.default_rng(0).standard_normal(RATE))


def test_syllables_and_names():
    assert syllables("The children walked to the park.") == 7
    assert syllables("Press 9 for more entries.") == 6
    assert [name_of(value, (1, 2), ("low", "medium", "high")) for value in (0, 1, 2)] == [
        "low",
        "medium",
        "high",
    ]


def test_sentences_and_voices_of_the_test_are_not_in_training():
    assert not {plain(clip["text"]) for clip in TRAIN} & {plain(clip["text"]) for clip in TEST}
    assert {clip["voice"] for clip in TEST} - {clip["voice"] for clip in TRAIN} == TEST_VOICES
    assert Counter(clip["voice"] for clip in TEST) == {
        "allison": 15,
        "slt_hts": 20,
        "awb": 20,
        "kal": 20,
        **dict.fromkeys(["af_heart", "am_fenrir", "bf_emma", "bm_fable"], 8),
    }
    assert Counter(clip["voice"] for clip in TRAIN) == {
        "allison": 46,
        "slt": 24,
        "rms": 24,
        "joe": 24,
        **{voice: 5 for pair in KOKORO_VOICES["train"] for voice in pair},
    }
    voices = {clip["voice"]: clip["gender"] for clip in TRAIN}
    assert Counter(voices.values()) == {"female": 12, "male": 12}
    for voice in {clip["voice"] for clip in CLIPS}:
        assert len({clip["gender"] for clip in CLIPS if clip["voice"] == voice}) == 1
    texts = read_json("speech/texts.json")
    assert {clip["text"] for clip in CLIPS} == {
        *(prompt["text"] for prompt in texts["prompts"].values()),
        *texts["train"],
        *texts["test"],
    }


def test_the_clips_are_those_that_render_speech_writes():
    planned = {}
    for utterance in plan_utterances(read_json("speech/texts.json")):
        planned[f"{utterance.voice}_{utterance.number:02d}.flac"] = utterance
    for clip in CLIPS:
        assert clip.items() >= ABOUT[clip["voice"]].items(), clip["file"]
        if clip["voice"] != "allison":
            utterance = planned.pop(clip["file"])
            assert (clip["text"], clip["split"]) == (utterance.text, utterance.split), clip["file"]
    assert not planned
    # A sentence does not reveal the gender: of Kokoro, as many women as men speak it.
    genders = Counter()
    for clip in CLIPS:
        if clip["voice"] in KOKORO:
            genders[clip["text"]] += 1 if clip["gender"] == "female" else -1
    assert set(genders.values()) == {0}


def test_no_prompt_is_among_the_sounds():
    sounds = {
        Path(sound["source_file"]).name
        for sound in read_manifest()
        if "asterisk" in sound["package"]
    }
    prompts = {Path(clip["source_file"]).name for clip in CLIPS if "source_file" in clip}
    assert len(sounds) == 24
    assert len(prompts) == 61
    assert not sounds & prompts
    assert not set(BY_FILE) & {sound["file"] for sound in read_manifest()}


def test_attribution_names_every_licence_and_source(tmp_path):
    write_speech_attribution(CLIPS, tmp_path / "ATTRIBUTION.md")
    text = (SPEECH / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert text == (tmp_path / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for key in ("licence", "package", "author", "speaker"):
        assert all(clip[key] in text for clip in CLIPS), key
    assert all(
        f"| {clip['file']} | {clip['source_file']} |" in text
        for clip in CLIPS
        if "source_file" in clip
    )


# The built examples


def test_same_seed_same_bytes(built, tmp_path):
    build.build(build.BuildSettings("ltu_as", tmp_path / "fold0", SMALL))
    made = sorted(path.relative_to(built) for path in built.rglob("*.*"))
    assert made == sorted(
        path.relative_to(tmp_path / "fold0") for path in (tmp_path / "fold0").rglob("*.*")
    )
    for path in made:
        first, second = (folder / path for folder in (built, tmp_path / "fold0"))
        if path.suffix == ".flac":
            assert first.read_bytes() == second.read_bytes(), path
        else:  # The relative path of the committed clips depends on the output folder.
            path_start = r'"[./\w-]*data/toy/(audio|speech)/'
            assert re.sub(path_start, '"', first.read_text()) == re.sub(
                path_start, '"', second.read_text()
            ), path


def test_stages_have_the_requested_examples(built):
    for stage, count in zip((1, 2, 3), (100, 150, 200), strict=True):
        examples = load(built, f"stage{stage}")
        assert len(examples) == count
        assert len(spoken_examples(built, stage)) == round(0.4 * count)
        assert all(
            list(example)[0] == "instruction" and example["output"] and "{" not in example["output"]
            for example in examples
        )
    assert {example["task"] for example in spoken_examples(built, 1, 2)} == set(
        speech_examples.CLASSIFY
    )
    assert {example["task"] for example in spoken_examples(built, 3)} == set(speech_examples.TASKS)
    assert {example["task"] for example in load(built, "stage1")} == {
        "cla_label",
        "cla_label_des",
        *speech_examples.CLASSIFY,
    }
    for fractions in (speech_examples.CLASSIFY, speech_examples.ALL):
        assert sum(fractions.values()) == pytest.approx(1.0)
    genders = Counter(
        example["output"]
        for example in spoken_examples(built)
        if example["task"] == "speech_gender"
    )
    assert abs(genders["Female."] - genders["Male."]) <= 6


def test_inputs_of_training_and_test_examples(built):
    """Committed clips have Whisper's transcript, which is made when a test is answered."""
    transcripts = read_json("transcripts.json")
    for stage in (1, 2, 3):
        for example in load(built, f"stage{stage}"):
            rendered = example["audio_id"].startswith("audio/")
            if example["dataset"] == "toy_sounds":
                name = Path(example["audio_id"]).name
                assert example["input"] == ("" if rendered else transcripts[name])
        examples = spoken_examples(built, stage)
        empty = [example["input"] == "" for example in examples]
        assert np.mean(empty) == pytest.approx(0.3, abs=0.02)
        assert not [
            example
            for example in examples
            if example["task"] in speech_examples.TRANSCRIPT_TASKS and example["input"] == ""
        ]
    for right, wrong in zip(
        load(built, "heldout_right"), load(built, "heldout_wrong"), strict=True
    ):
        assert right["output"] == wrong["output"]
        assert right["audio_id"] != wrong["audio_id"]
    for name in ("heldout_right", "heldout_open", "heldout_wrong", "heldout_none"):
        assert not [example for example in load(built, name) if "input" in example]


def test_transcripts_are_there_for_every_clip_in_training():
    transcripts = read_json("transcripts.json")
    training = {clip["file"] for clip in CLIPS if clip["split"] == "train"}
    sounds = {clip["file"] for clip in read_manifest()}
    assert set(transcripts) == training | sounds
    assert all(transcripts[file] for file in training)


@pytest.mark.slow
def test_transcripts_are_those_of_whisper():
    whisper = Path("pretrained_mdls/whisper-tiny.en/whisper.pt")
    if not whisper.is_file():
        pytest.skip("python -m train_scripts.quickstart.download_pretrained makes this Whisper")
    transcripts = read_json("transcripts.json")
    extractor = LtuAsFeatureExtractor(None, None, str(whisper), transcription_model=None)
    extractor.device = "cpu"
    for name in sorted(transcripts)[::40]:
        path = AUDIO / name if (AUDIO / name).is_file() else SPEECH / name
        assert extractor.transcribe([load_audio(path, DOWNMIX)])[0] == transcripts[name]


def test_sounds_without_transcripts(tmp_path):
    """The flag of the comparison in docs/toy_experiment.md."""
    settings = build.BuildSettings("ltu_as", tmp_path, SMALL, with_transcripts=False)
    build.build(replace(settings, speech_fraction=0.2))
    examples = load(tmp_path, "stage2")
    sounds = [example for example in examples if example["dataset"] == "toy_sounds"]
    assert all(example["input"] == "" for example in sounds)
    assert len(sounds) == round(0.8 * len(examples))
    assert all(example["input"] == "" for example in load(tmp_path, "heldout_right"))


def test_training_examples_say_what_the_manifest_says(built):
    cuts, sources = cut_offs(CLIPS), load(built, "sources")
    transcripts = read_json("transcripts.json")
    for example in spoken_examples(built):
        provenance = sources.get(
            example["audio_id"],
            {"factor": 1.0, "parts": [{"clip": Path(example["audio_id"]).name}]},
        )
        clip = BY_FILE[provenance["parts"][0]["clip"]]
        assert clip["split"] == "train"
        assert clip["voice"] not in TEST_VOICES
        assert example["input"] in ("", clip["text"], transcripts[clip["file"]])
        pitch, speed = pitch_and_speed(clip, provenance["factor"], cuts)
        outputs = {"speech_gender": clip["gender"].capitalize() + "."}
        outputs |= {
            "speech_pitch": f"The pitch is {pitch}.",
            "speech_speed": f"The speed is {speed}.",
        }
        outputs |= {"spoken_text": f"Spoken text: {clip['text']}"}
        if example["task"] == "speech_joint":
            assert all(part in example["output"] for part in (clip["text"], pitch, speed)), example
        else:
            assert example["output"] == outputs[example["task"]], example
        assert (
            example["task"] not in speech_examples.TRANSCRIPT_TASKS or provenance["factor"] == 1.0
        )


def test_audio_labels_are_those_of_the_training_audio(built):
    """Every clip in a stage has the labels of all that is in it; no held-out clip has any."""
    sources = load(built, "sources")
    sounds = {sound["file"]: sound for sound in read_fold(0)[0]}
    voices = {"female": "woman speaking", "male": "man speaking"}
    records = load(built, "audio_labels")
    for record in records:
        names = [Path(record["audio_id"]).name]
        if record["audio_id"] in sources:
            names = [part["clip"] for part in sources[record["audio_id"]]["parts"]]
        expected = set()
        for name in names:
            if name in sounds:
                expected |= {sounds[name]["label"], sounds[name]["category"]}
            else:
                assert BY_FILE[name]["split"] == "train"
                expected |= {voices[BY_FILE[name]["gender"]], "speech"}
        assert record["labels"] == sorted(expected)
    stages = [example for stage in (1, 2, 3) for example in load(built, f"stage{stage}")]
    assert [record["audio_id"] for record in records] == sorted(
        {example["audio_id"] for example in stages}
    )


def test_changed_versions_are_faster_or_slower_by_twelve_percent_at_most(built):
    sources = {
        file: source
        for file, source in load(built, "sources").items()
        if source["kind"] == "speech"
    }
    assert len(sources) == len(TRAIN)
    for file, provenance in sources.items():
        own = load_audio(SPEECH / provenance["parts"][0]["clip"])
        made = load_audio(built / file)
        assert 0.879 < provenance["factor"] < 1.121
        assert provenance["factor"] != 1.0
        assert len(own) / len(made) == pytest.approx(provenance["factor"], rel=1e-3)
        assert 0.05 < np.abs(made).max() < 1.0


def test_examples_are_read_by_the_trainer(built):
    names = [
        "stage1",
        "stage2",
        "stage3",
        "heldout_right",
        "heldout_wrong",
        "show",
        *(f"speech_{n}" for n in HELD_OUT),
    ]
    for name in names:
        assert all(
            Path(example["audio"]).is_file() for example in read_examples(built / f"{name}.json")
        ), name
    assert all(example["audio"] is None for example in read_examples(built / "heldout_none.json"))


def test_heldout_speech(built):
    files = {name: load(built, f"speech_{name}") for name in HELD_OUT}
    texts = {file: clip["text"] for file, clip in BY_FILE.items()}
    for name, examples in files.items():
        clips = [BY_FILE[Path(example["audio_id"]).name] for example in examples]
        expected_clips = (
            [clip for clip in TEST if clip["voice"] in TEST_VOICES]
            if name.startswith("gender")
            else TEST
        )
        assert clips == expected_clips, name
        assert [example["output"] for example in examples] == [
            toy_speech.reference(f"speech_{name}", clip) for clip in clips
        ]
        for example, clip in zip(examples, clips, strict=True):
            expected = {"gender_empty": "", "words_none": "", "words_whisper": None}.get(
                name, clip["text"]
            )
            if name == "words_wrong":
                assert example["input"] != clip["text"]
                assert example["input"] in texts.values()
            else:
                assert example.get("input") == expected
    show = load(built, "show")
    assert len({example["task"] for example in show}) == len(show) == 5
    assert {example["dataset"] for example in show} == {"toy_sounds", "toy_speech"}


def test_heldout_sounds_are_those_of_the_fold(built):
    _, heldout = read_fold(0)
    files = sorted(sound["file"] for sound in heldout)
    assert (
        sorted(Path(example["audio_id"]).name for example in load(built, "heldout_right")) == files
    )


def test_test_questions_are_never_training_questions(built):
    tasks = [
        *speech_examples.QUESTIONS["closed"].values(),
        *speech_examples.QUESTIONS["open"].values(),
    ]
    train = {plain(question) for texts in tasks for question in texts["train"]}
    assert not train & {plain(question) for texts in tasks for question in texts["test"]}
    assert "can you identify the spoken text" in train
    tested = {
        plain(example["instruction"])
        for name in HELD_OUT
        for example in load(built, f"speech_{name}")
    }
    assert not tested & {plain(example["instruction"]) for example in spoken_examples(built)}


@pytest.mark.parametrize(
    "bad",
    [
        ["--num_examples", "1,2"],
        ["--num_examples", "a,b,c"],
        ["--version", "3"],
        ["--versions", "0"],
    ],
)
def test_bad_arguments_stop(bad, capsys):
    with pytest.raises(SystemExit):
        build.parse_args(["--kind", "ltu_as", *bad])
    assert bad[0] in capsys.readouterr().err
