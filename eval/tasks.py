"""Lists the benchmarks of both papers and the toy set, one entry each.

Prompts are the papers' own to the character ("Close-ended" in evaluation, "Closed-ended" in
training). `prompt` is "" where each question has its own.

The values of the papers are in the unit of the metric (0.831 is 83.1 %). Those of LTU are from
OpenReview thread nBZBPXdJlC, tables of the authors' answers; those of LTU-AS from the ASRU 2023
poster. "LTU" on speech is the poster's value for the model of the first paper, trained on audio
only. A value without a source is left out.

`options` are settings of the scoring function (eval.classification documents them);
`num_examples` is the number that the original asserts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CAPTION = "Close-ended question: Write an audio caption describing the sound."
AUDIOCAPS = "Close-ended question: Write an audio caption describing the sound, in AudioCaps style."
CLOTHO = "Close-ended question: Create a caption for audio, in Clotho style."
LIBRISPEECH = "Closed-ended question: Can you identify the spoken text?"
IEMOCAP = "How would you describe the speaker's emotions? Give the emotion classification."
GENRE = "Describe the music genre with a sentence?"
ONE = "classification:single_label"
MANY = "classification:multi_label"
SOUND = {"prefix": "sound of ", "answer": "after_colon_cut", "clip_negative_cosines": True}
PHRASE = {
    "prefix": "sound of ",
    "answer": "after_phrase",
    "reference": "after_colon_space",
    "separator": "; ",
}
EMOTION = {"prefix": "", "answer": "whole", "reference": "first_sentence"}
MUSIC = {"prefix": "Music Genre: ", "answer": "after_colon", "reference": "lstrip"}


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Args:
        name: Name on the command line and in reports.
        kind: Paper that has it: "ltu", "ltu_as" or "both".
        scorer: Module in eval and function, such as "classification:single_label".
        questions: File name of the questions.
        prompt: The prompt, or "" if each question has its own.
        metric: The main metric.
        paper: Model -> the papers' value, in the unit of the metric.
        options: Literal settings of the scoring function.
    """

    name: str
    kind: str
    scorer: str
    questions: str
    prompt: str
    metric: str
    paper: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


# fmt: off
TASKS = (
    Task("esc50", "both", ONE, "esc50.json", CAPTION, "accuracy",
         # The poster's 80.8 for LTU-AS; SpeechBrain's recipe quotes 76.6 from the paper.
         {"LTU": 0.831, "LTU full FT": 0.859, "LTU-AS": 0.808, "Pengi": 0.919},
         {"labels": "esc50.txt", "prefix": "sound of ", "answer": "after_colon",
          "num_examples": 2000}),
    Task("dcase17", "ltu", ONE, "dcase17.json", CAPTION, "micro_f1",
         {"LTU": 0.459, "LTU full FT": 0.472, "Pengi": 0.338},
         SOUND | {"labels": "dcase17.txt", "reference": "no_comma"}),
    Task("vocalsound", "ltu", ONE, "vocalsound.json", CAPTION, "accuracy",
         {"LTU": 0.556, "LTU full FT": 0.690, "Pengi": 0.603},
         SOUND | {"labels": "vocalsound.txt"}),
    Task("tut17", "ltu", ONE, "tut17.json", CAPTION, "accuracy",
         {"LTU": 0.325, "LTU full FT": 0.330, "Pengi": 0.352},
         SOUND | {"labels": "tut17.txt", "reference": "no_underscore"}),
    Task("beijing_opera", "ltu", ONE, "beijing_opera.json", CAPTION, "accuracy",
         {"LTU": 0.699, "LTU full FT": 0.598, "Pengi": 0.623},
         SOUND | {"labels": "beijing_opera.txt", "reference": "no_hyphenation"}),
    Task("vggsound", "ltu", ONE, "vggsound.json", CAPTION, "accuracy", {"LTU": 0.503},
         {"labels": "vggsound.txt", "prefix": "sound of ", "answer": "after_phrase",
          "reference": "after_colon_space_lower", "clip_negative_cosines": True,
          "rank_by_cosine": True}),
    Task("fsd50k", "ltu", MANY, "fsd50k.json", CAPTION, "mAP",
         {"LTU": 0.463, "LTU full FT": 0.457, "Pengi": 0.467}, PHRASE | {"labels": "fsd50k.txt"}),
    Task("audioset", "ltu", MANY, "audioset.json", CAPTION, "mAP", {"LTU": 0.187},
         PHRASE | {"labels": "audioset.txt"}),
    Task("audiocaps", "both", "captions:captions", "audiocaps.json", AUDIOCAPS, "SPICE",
         {"LTU": 0.170, "LTU-AS": 0.150}),
    Task("clotho", "ltu", "captions:captions", "clotho.json", CLOTHO, "SPICE", {"LTU": 0.119}),
    # No source says whether 4.9 % is with or without Whisper's transcripts substituted.
    Task("librispeech", "ltu_as", "speech:word_error_rate", "librispeech.json", LIBRISPEECH, "wer",
         {"LTU-AS": 0.049, "LTU": 1.042}),
    Task("iemocap", "ltu_as", ONE, "iemocap.json", IEMOCAP, "accuracy",
         {"LTU-AS": 0.652, "LTU": 0.382}, EMOTION | {"labels": "iemocap.txt"}),
    # The original's evaluators of MOSEI and FMA are not released: the classes, the reading of
    # answers and the metric are ours.
    Task("mosei", "ltu_as", ONE, "mosei.json", "Describe the speaker emotion with a sentence.",
         "accuracy", {}, EMOTION | {"labels": "mosei.txt"}),
    Task("voxceleb_gender", "ltu_as", "speech:gender", "voxceleb_gender.json",
         "Is the speaker male or female? Output an answer anyways.", "macro_f1",
         {"LTU-AS": 0.908, "LTU": 0.770}),
    Task("voxceleb_age", "ltu_as", "speech:age", "voxceleb_age.json", "How old is the speaker?",
         "mae", {"LTU-AS": 7.3}),  # years
    Task("gtzan", "both", ONE, "gtzan.json", GENRE, "accuracy",
         {"LTU-AS": 0.503, "LTU": 0.298}, MUSIC | {"labels": "gtzan.txt"}),
    Task("fma", "ltu_as", MANY, "fma.json", GENRE, "mAP", {},
         MUSIC | {"labels": "fma.txt", "separator": ", "}),
    # Values on GPT-4's questions. On GPT-3.5's, open_as_gpt3.json, they are 0.959 and 0.074.
    Task("open_ended", "both", "judge:open_ended", "open_as_gpt4.json", "", "following_rate",
         {"LTU": 0.969, "Pengi": 0.031}),
    # data.toy.build writes the questions.
    Task("toy", "both", "toy:toy_category", "heldout_right.json", "", "accuracy"),
)
# fmt: on


def find_task(name: str) -> Task:
    """Return the task of this name.

    Raises:
        ValueError: There is no such task.
    """
    for task in TASKS:
        if task.name == name:
            return task
    names = ", ".join(task.name for task in TASKS)
    raise ValueError(f"There is no task {name!r}. Choose from: {names}.")
