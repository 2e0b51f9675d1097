"""Writes data/toy/transcripts.json: what Whisper transcribes of the clips that models train on.

    python -m train_scripts.quickstart.transcribe_toy

As the examples of OpenASQA do, training examples of LTU-AS hold the transcript of their clip, so
that nobody transcribes the same clips again. Transcripts of sounds are hallucinated or empty, as
they will be in use. Held-out clips are transcribed when they are tested, by the same Whisper.
"""

from pathlib import Path

from tqdm import tqdm

from data.command_line import command_parser
from data.toy.sound_clips import AUDIO, HERE, read_manifest
from data.toy.speech_clips import SPEECH, read_speech
from ltu.data.audio import load_audio
from ltu.files import run_command, write_json
from ltu_as.feature_extraction_ltu_as import DOWNMIX, LtuAsFeatureExtractor

WHISPER = Path("pretrained_mdls/whisper-tiny.en/whisper.pt")


def transcribe(whisper: Path) -> dict[str, str]:
    """Return file name -> transcript of every sound, and of the spoken clips in training."""
    extractor = LtuAsFeatureExtractor(None, None, str(whisper), transcription_model=None)
    paths = [AUDIO / sound["file"] for sound in read_manifest()]
    paths += [SPEECH / clip["file"] for clip in read_speech() if clip["split"] == "train"]
    transcripts = {}
    for path in tqdm(paths, "transcribing", unit="clip"):
        transcripts[path.name] = extractor.transcribe([load_audio(path, DOWNMIX)])[0]
    return transcripts


def main(argv: list[str] | None = None) -> None:
    """Write the file."""
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument(
        "--whisper", type=Path, default=WHISPER, help="The openai-whisper .pt file."
    )
    parser.add_argument(
        "--output_path", type=Path, default=HERE / "transcripts.json", help="The file to write."
    )
    args = parser.parse_args(argv)
    transcripts = transcribe(args.whisper)
    write_json(transcripts, args.output_path)
    print(f"{len(transcripts)} transcripts in {args.output_path}")


if __name__ == "__main__":
    run_command(main)
