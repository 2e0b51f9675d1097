"""Serves the page in the browser that answers questions about clips, and its endpoint `/predict`.

The file has three parts: the layout of the page (`build_components`), the spectrogram of a clip
(`describe_clip`), and the class `Demo`, which handles the events of the page. `gradio_security`
restricts what a request can open and what a browser loads. A clip is an upload, never a path or an
address in a request. Nothing of a request is printed: failed events are counted by their place.
"""

import argparse
import base64
import html
import io
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import gradio as gr
import numpy as np
import torch
from matplotlib.image import imsave

from ltu.data.audio import AudioError, Waveform, decode_audio
from ltu.inference.engine import LtuEngine
from ltu.inference.generation_flags import read_decoding_flags
from ltu.inference.requests import Answer, Request
from ltu.inference.sampling import GREEDY_DECODING, ORIGINAL_DECODING
from ltu.serving.gradio_security import check_is_upload, fastapi_settings

TITLES = {  # by the model_type of the configuration
    "ltu": "LTU: Listen, Think, and Understand",
    "ltu_as": "LTU-AS: Joint Audio and Speech Understanding",
}
DEFAULT_QUESTION = "What can be inferred from the audio?"
PRESETS = (
    DEFAULT_QUESTION,
    "Which sounds are there? Give labels.",
    "Describe the clip in one sentence.",
    "What comes first, what later?",
    "Where could this be, and why?",
)
SPEECH_PRESETS = (
    "What is said?",
    "How old is the speaker, and which gender?",
    "How does the speaker feel, and what tells you?",
)
# Clips of the toy data that the page offers. An installed package does not contain them.
TOY_SET = Path(__file__).parents[2] / "data" / "toy"
EXAMPLES = (
    "dog_96827b",
    "rain_41d8e2",
    "siren_4e843a",
    "church_bell_f43a7a",
    "drum_beat_7a32dd",
    "woman_speaking_e2f0fe",
    "allison_24",
)
MAX_NEW_TOKENS = 1024
MAX_CHARACTERS = 8000  # of a question and its transcript
MAX_WAITING = 32  # questions in the queue
MAX_COLUMNS = 1200  # pixels, width of the spectrogram
# Seconds between two updates of a growing answer. A browser that draws each token of a fast model
# is too busy to react to clicks.
UPDATE_SECONDS = 0.05
FAILED_CALL = (
    "The demo cannot answer this call. Its inputs are described at /gradio_api/info; a clip is an "
    "upload."
)
ERROR_HTML = "<div class='bad'>{}</div>"
CSS = """
.mel { position: relative; height: 132px; border-radius: 6px; overflow: hidden;
  background: #000004 }
.mel img { width: 100%; height: 100%; object-fit: fill; margin: 0 }
.mel div { position: absolute; inset: 0 auto 0 0; border: 2px solid var(--color-accent);
  border-radius: 6px }
.mel .rest { inset: 0 0 0 auto; border: 0; background: rgb(90 90 90 / 80%); color: #fff;
  display: flex; align-items: center; justify-content: center; overflow: hidden;
  font-size: 13px; white-space: nowrap }
.axis { display: flex; justify-content: space-between; font-size: 12px;
  color: var(--body-text-color-subdued) }
.bad { border-left: 4px solid #dc2626; padding: 4px 10px; overflow-wrap: anywhere }
.presets { flex-wrap: wrap; gap: 6px }
.presets button { flex: 0 1 auto; min-width: 0; min-height: 34px; font-size: 14px;
  white-space: normal }
"""
PRIVATE = {"api_visibility": "private"}  # An event that the page uses and no client can call.
# Events that run the model do so one at a time.
ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1}


# --- the layout of the page


@dataclass
class PageComponents:
    """The components of the page that the events read or update.

    Attributes:
        clip: the upload or recording.
        preview: spectrogram of the clip, or the reason why it cannot be decoded.
        transcript: transcript of the clip; visible if the model transcribes clips.
        chat: questions and answers about the clip.
        status: how the last question ended.
        question: the next question.
        ask: the button that starts an answer.
        stop: the button that cancels it.
        settings: name of a setting -> its component.
        transcribed_clip: path of the clip that `transcript` belongs to.
        messages: the messages of `chat`, as a state.
    """

    clip: gr.Audio
    preview: gr.HTML
    transcript: gr.Textbox
    chat: gr.Chatbot
    status: gr.HTML
    question: gr.Textbox
    ask: gr.Button
    stop: gr.Button
    settings: dict[str, gr.components.Component]
    transcribed_clip: gr.State
    messages: gr.State


@dataclass(frozen=True)
class SliderSetting:
    """A setting of decoding that has a slider: its name, its range and its label."""

    name: str
    minimum: float
    maximum: float
    step: float
    label: str


SLIDERS = (
    SliderSetting("temperature", 0.05, 2, 0.05, "Temperature, for sampling"),
    SliderSetting("top_p", 0.05, 1, 0.05, "Top-p, for sampling"),
    SliderSetting("top_k", 0, 1000, 1, "Top-k, for sampling (0: no limit)"),
    SliderSetting("repetition_penalty", 1, 2, 0.05, "Repetition penalty"),
    SliderSetting("max_new_tokens", 1, MAX_NEW_TOKENS, 1, "Maximum number of new tokens"),
)


def build_components(engine: LtuEngine, args: argparse.Namespace) -> PageComponents:
    """Build the components of the page inside an open `gr.Blocks`."""
    transcribes = engine.processor.front_end.transcribes
    model_name = html.escape(Path(args.model).name)
    gr.HTML(f"<h1>{TITLES[engine.kind]}</h1>{model_name} {engine.checkpoint[:12]}")
    with gr.Row():
        with gr.Column(min_width=320):
            clip = gr.Audio(type="filepath", buttons=["download"], label="Clip", elem_id="clip")
            preview = gr.HTML(elem_id="spectrogram")
            transcript = gr.Textbox(
                label="Transcript, part of the prompt: correct or clear it",
                lines=2,
                elem_id="transcript",
                visible=transcribes,
            )
            build_examples(clip)
        with gr.Column(min_width=320):
            chat = gr.Chatbot(
                label="Questions about this clip",
                elem_id="chat",
                height=380,
                render_markdown=False,
                placeholder="Each question is independent: the model sees no earlier ones.",
                buttons=["copy_all"],
            )
            status = gr.HTML(elem_id="status")
            question = gr.Textbox(
                DEFAULT_QUESTION, label="Question", max_lines=6, elem_id="question"
            )
            with gr.Row():
                ask = gr.Button("Ask", variant="primary", min_width=80, elem_id="ask")
                stop = gr.Button("Stop", interactive=False, min_width=80, elem_id="stop")
            with gr.Row(elem_classes="presets"):
                presets = PRESETS
                if transcribes:
                    presets = PRESETS + SPEECH_PRESETS
                build_presets(question, presets)
            with gr.Accordion("Sampling, length, chunks", open=False, elem_id="settings"):
                settings = build_settings(engine, args)
    return PageComponents(
        clip=clip,
        preview=preview,
        transcript=transcript,
        chat=chat,
        status=status,
        question=question,
        ask=ask,
        stop=stop,
        settings=settings,
        transcribed_clip=gr.State(None),
        messages=gr.State([]),
    )


def build_examples(clip: gr.Audio) -> None:
    """Build a button for each example clip that is there."""
    files: list[Path] = []
    for name in EXAMPLES:
        files.extend(TOY_SET.glob(f"*/{name}.flac"))
    if files:
        labels = [file.stem.rpartition("_")[0].replace("_", " ") for file in files]
        examples = [[str(file)] for file in files]
        gr.Examples(examples, [clip], example_labels=labels, **PRIVATE)


def build_presets(question: gr.Textbox, texts: tuple[str, ...]) -> None:
    """Build a button for each text; it writes the text into the question, in the browser."""
    for text in texts:
        button = gr.Button(text, size="sm")
        button.click(None, outputs=question, js=f"() => {json.dumps(text)}")


def build_settings(
    engine: LtuEngine, args: argparse.Namespace
) -> dict[str, gr.components.Component]:
    """Build a component for each setting, with the value of the flags, and return them by name."""
    defaults = ORIGINAL_DECODING | GREEDY_DECODING | {"repetition_penalty": 1.0}
    values = defaults | read_decoding_flags(args)
    settings: dict[str, gr.components.Component] = {
        "do_sample": gr.Checkbox(
            values["do_sample"], label="Sample (else greedy)", elem_id="do_sample"
        )
    }
    for slider in SLIDERS:
        value = values[slider.name]
        settings[slider.name] = gr.Slider(
            # The value of a flag may be outside the usual range.
            minimum=min(slider.minimum, value),
            maximum=max(slider.maximum, value),
            value=value,
            step=slider.step,
            label=slider.label,
            elem_id=slider.name,
        )
    settings["seed"] = gr.Number(args.seed, precision=0, minimum=0, label="Seed, for sampling")
    chunk_seconds = engine.processor.feature_extractor.chunk_seconds
    settings["num_chunks"] = gr.Number(
        args.num_chunks,
        precision=0,
        minimum=0,
        label=f"Chunks of {chunk_seconds:g} s that are used (0: the whole clip)",
        elem_id="num_chunks",
    )
    return settings


def button_updates(is_busy: bool) -> list[dict]:
    """Return the updates of the buttons Ask and Stop while an answer grows, or while none does."""
    return [gr.update(interactive=not is_busy), gr.update(interactive=is_busy)]


# --- the spectrogram of a clip and the text below an answer


@dataclass(frozen=True)
class ClipPreview:
    """The part of the page that describes a clip: its HTML, and whether the clip was decoded."""

    html: str
    is_decoded: bool


def describe_clip(clip: Waveform, extractor: Any, num_chunks: int | None) -> str:
    """Return HTML with the spectrogram of a clip, its length, and the part that is used.

    Args:
        clip: the decoded clip.
        extractor: the feature extractor of the model.
        num_chunks: the number of chunks that are used; 0 or None for the whole clip.
    """
    num_samples = len(clip.waveform)
    seconds = num_samples / extractor.sampling_rate
    chunks_in_clip = extractor.count_chunks(num_samples)
    chunks_used = min(num_chunks or chunks_in_clip, chunks_in_clip)
    seconds_used = min(seconds, chunks_used * extractor.chunk_seconds)
    percent_used = 100 * seconds_used / seconds

    image = base64.b64encode(draw_spectrogram(clip.waveform, extractor)).decode()
    unused = ""
    if percent_used < 99.8:
        unused = f"<div class='rest' style='left:{percent_used:.2f}%'>not used</div>"
    channels = "1 channel"
    if clip.channels != 1:
        used = "of which the first is used" if clip.downmix == "first" else "whose mean is used"
        channels = f"{clip.channels} channels, {used}"
    return (
        "<div class='mel'>"
        f"<img alt='log-mel spectrogram of the clip' src='data:image/png;base64,{image}'>"
        f"<div style='width:{percent_used:.2f}%'></div>{unused}</div>"
        f"<div class='axis'><span>0 s</span><span>{seconds:.2f} s</span></div>"
        f"Used: {seconds_used:.2f} of {seconds:.2f} s. "
        f"The file: {clip.sampling_rate:,} Hz, {channels}."
    )


def draw_spectrogram(waveform: np.ndarray, extractor: Any) -> bytes:
    """Return a PNG of the log-mel spectrogram of a whole clip, at most MAX_COLUMNS wide.

    Args:
        waveform: (samples,), 16 kHz.
        extractor: the feature extractor of the model.
    """
    mels = extractor.spectrogram(torch.from_numpy(waveform)).T  # (bins, frames)
    width = min(MAX_COLUMNS, mels.shape[1])
    mels = torch.nn.functional.interpolate(mels[None], width, mode="area")[0]  # (bins, width)
    # The quietest 2 % are black, so that silence does not take most of the colours.
    darkest = mels.quantile(0.02).item()
    file = io.BytesIO()
    imsave(file, mels.numpy(), vmin=darkest, cmap="magma", origin="lower")
    return file.getvalue()


def error_html(reason: str, message: str | None) -> str:
    """Return an error as HTML; the message may contain the name of an upload."""
    return ERROR_HTML.format(html.escape(f"{reason}: {message}"))


def answer_status(answer: Answer) -> str:
    """Return HTML about an answer: its status, the audio that was used, its tokens and its time."""
    if not answer.answered:
        return error_html(answer.status, answer.error)
    endings = {"length": ", cut at the maximum", "cancelled": ", stopped"}
    ending = endings.get(answer.finish_reason, "")
    used = f"used {answer.seconds_heard:.2f} of {answer.seconds_total:.2f} s"
    tokens = f"{answer.new_tokens} tokens{ending}"
    status = f"{answer.status}: {used} · {tokens} · {answer.seconds:.1f} s"
    return "<br>".join([status, *map(html.escape, answer.warnings)])


# --- the events of the page


class Page(gr.Blocks):
    """A page that counts its failed events by their place, and prints the first at each place.

    Gradio prints them with a traceback, which quotes the values of a request.

    Args:
        counts: type and place of an error -> number of events that ended with it.
        log: takes a line about an error.
        settings: those of `gr.Blocks`.
    """

    def __init__(self, counts: Counter[str], log: TextIO, **settings: Any):
        super().__init__(**settings)
        self.counts = counts
        self.log = log

    async def process_api(self, *args: Any, **settings: Any) -> dict[str, Any]:
        """Process an event.

        Raises:
            gr.Error: with a message for the visitor; Gradio does not print it.
        """
        try:
            return await super().process_api(*args, **settings)
        except gr.Error as error:
            error.print_exception = False
            raise
        except Exception as error:
            # All errors, as in the server: each is counted, and none may be printed.
            place = traceback.extract_tb(error.__traceback__)[-1]
            file = Path(place.filename).name
            fault = f"{type(error).__name__} in {file}, line {place.lineno}"
            self.counts[fault] += 1
            if self.counts[fault] == 1:
                print(f"An event failed: {fault}", file=self.log, flush=True)
            raise gr.Error(FAILED_CALL, print_exception=False) from None


class Demo:
    """Handles the events of the page and of `/predict`.

    Args:
        engine: generates the answers.
        args: the flags of `ltu.inference_gradio`.
        log: takes the lines about failed events; stderr by default.

    Attributes:
        counts: status -> number of questions that ended with it; also type and place of an error
            -> number of events that failed.
    """

    def __init__(self, engine: LtuEngine, args: argparse.Namespace, log: TextIO | None = None):
        self.log = log or sys.stderr
        self.engine = engine
        self.processor = engine.processor
        self.args = args
        self.counts: Counter[str] = Counter()
        self.setting_names: list[str] = []  # in the order of the components

    def launch(self) -> gr.Blocks:
        """Open the page and return it; the server runs in a thread of its own.

        Raises:
            ValueError: the environment variable GRADIO_TEMP_DIR does not name a folder for uploads.
            OSError: the port is in use.
        """
        if not os.environ.get("GRADIO_TEMP_DIR"):
            raise ValueError(
                "Set GRADIO_TEMP_DIR to a folder for uploads alone: all that is in it is removed."
            )
        page = self.build()
        page.launch(
            server_name=self.args.host,
            server_port=self.args.port,
            share=self.args.share,
            max_file_size=self.args.max_mb * 2**20,
            footer_links=["api", "settings"],
            # Fonts of the system, because others are from another host.
            theme=gr.themes.Default(
                primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"]
            ),
            css=CSS,
            app_kwargs=fastapi_settings(self.args.share),
            ssr_mode=False,
            prevent_thread_lock=True,
            quiet=True,
        )
        return page

    def build(self) -> gr.Blocks:
        """Build the page: its components, its events and `/predict`."""
        title = TITLES[self.engine.kind]
        with Page(self.counts, self.log, title=title, analytics_enabled=False) as page:
            components = build_components(self.engine, self.args)
            self.setting_names = list(components.settings)
            self._connect_clip_events(components)
            self._connect_question_events(components)
            self._add_predict_endpoint(components)
        return page.queue(max_size=MAX_WAITING)

    def _connect_clip_events(self, page: PageComponents) -> None:
        """Connect what happens when the clip or the number of its chunks changes."""
        num_chunks = page.settings["num_chunks"]
        num_chunks.change(
            self.change_num_chunks,
            [page.clip, num_chunks],
            page.preview,
            show_progress="hidden",
            **PRIVATE,
        )
        page.clip.change(
            self.change_clip,
            [page.clip, num_chunks],
            [
                page.preview,
                page.chat,
                page.messages,
                page.status,
                page.transcript,
                page.transcribed_clip,
            ],
            show_progress="hidden",
            **ONE_AT_A_TIME,
            **PRIVATE,
        )

    def _connect_question_events(self, page: PageComponents) -> None:
        """Connect what happens when a question is submitted or stopped, or the chat is cleared."""
        answering = gr.on(
            [page.ask.click, page.question.submit],
            self.ask,
            [
                page.clip,
                page.question,
                page.messages,
                page.transcript,
                page.transcribed_clip,
                *page.settings.values(),
            ],
            [page.chat, page.messages, page.status, page.ask, page.stop],
            show_progress="hidden",
            **ONE_AT_A_TIME,
            **PRIVATE,
        )
        page.chat.clear(list, outputs=page.messages, queue=False, **PRIVATE)
        page.stop.click(
            lambda: ("stopped", *button_updates(is_busy=False)),
            None,
            [page.status, page.ask, page.stop],
            cancels=[answering],
            queue=False,
            **PRIVATE,
        )

    def _add_predict_endpoint(self, page: PageComponents) -> None:
        """Add `/predict`, with the parameters of the original's demos.

        That of LTU-AS, which transcribes, has a transcript and the size of the language model too.
        """
        llm_size = gr.Textbox("7B (Default)", visible=False)
        answer = gr.Textbox(label="Answer", visible=False)
        if self.processor.front_end.transcribes:
            function = self.predict_with_transcript
            inputs = [page.clip, page.transcript, page.question, llm_size]
        else:
            function = self.predict
            inputs = [page.clip, page.question]
        trigger = gr.Button(visible=False)
        trigger.click(function, inputs, answer, api_name="predict", **ONE_AT_A_TIME)

    def load_upload(self, path: str) -> Waveform:
        """Decode an upload that is no longer than --max_seconds.

        Raises:
            AudioError: the path is not an upload, or the clip cannot be decoded; the message has
                the name of the file without its folder.
        """
        try:
            check_is_upload(path)
            downmix = self.processor.front_end.downmix
            return decode_audio(path, self.args.max_seconds, downmix=downmix)
        except AudioError as error:
            raise AudioError(Path(path).name, error.reason, error.detail) from None

    def preview(self, path: str | None, num_chunks: int | None) -> ClipPreview:
        """Describe an upload, or give the reason why it cannot be decoded; "" without an upload."""
        if path is None:
            return ClipPreview("", is_decoded=False)
        try:
            clip = self.load_upload(path)
        except AudioError as error:
            return ClipPreview(error_html(error.reason, str(error)), is_decoded=False)
        description = describe_clip(clip, self.processor.feature_extractor, num_chunks)
        return ClipPreview(description, is_decoded=True)

    def change_num_chunks(self, path: str | None, num_chunks: int | None) -> str:
        """Return the preview of the clip for another number of chunks."""
        return self.preview(path, num_chunks).html

    def change_clip(self, path: str | None, num_chunks: int | None) -> Iterator[tuple]:
        """Yield the page for another clip, or for none: at once, and with the transcript.

        Each item is the preview, an empty chat, its messages, an empty status, the transcript, and
        the clip that the transcript belongs to.
        """
        preview = self.preview(path, num_chunks)
        is_transcribed = self.processor.front_end.transcribes and preview.is_decoded
        placeholder = "transcribing ..." if is_transcribed else ""
        transcript = gr.update(value="", placeholder=placeholder)
        yield preview.html, [], [], "", transcript, None
        if is_transcribed:
            clip = self.engine.cache.encode([Request("", path, num_chunks=num_chunks)])[0]
            text = getattr(clip, "transcript", "")  # The cache returns an AudioError without one.
            transcript = gr.update(value=text, placeholder="no speech")
            yield preview.html, [], [], "", transcript, path

    def ask(
        self,
        path: str | None,
        question: str,
        messages: list[dict],
        transcript: str,
        transcribed_clip: str | None,
        *setting_values: Any,
    ) -> Iterator[tuple]:
        """Yield the chat while one more answer grows.

        Args:
            path: the clip.
            question: the question about it.
            messages: the messages of the chat so far.
            transcript: as it is on the page.
            transcribed_clip: the clip that the transcript belongs to.
            setting_values: values of the settings, in the order of their components.

        Yields:
            the chat, its messages, the status, and the updates of Ask and Stop.
        """
        settings = read_decoding_flags(self.args)
        settings |= dict(zip(self.setting_names, setting_values, strict=True))
        seed = int(settings.pop("seed") or 0)
        num_chunks = int(settings.pop("num_chunks") or 0)
        # A transcript of the clip before is not used; the engine then transcribes this one.
        is_of_this_clip = transcribed_clip == path or not self.processor.front_end.transcribes
        request = Request(
            question,
            path,
            transcript if is_of_this_clip else None,
            mode=self.args.mode,
            seed=seed,
            num_chunks=num_chunks,
        )
        before = [*messages, {"role": "user", "content": question}]
        messages = [*before, {"role": "assistant", "content": ""}]
        yield messages, messages, "generating ...", *button_updates(is_busy=True)

        last_update = 0.0
        for part in self.stream_answer(request, settings):
            if isinstance(part, Answer):
                text = part.text if part.answered else "(no answer)"
                messages = [*before, {"role": "assistant", "content": text}]
                yield messages, messages, answer_status(part), *button_updates(is_busy=False)
            elif time.monotonic() - last_update > UPDATE_SECONDS:
                messages = [*before, {"role": "assistant", "content": part}]
                # The status and the buttons are not sent again, because they might arrive after
                # the update that Stop sends.
                yield messages, messages, gr.skip(), gr.skip(), gr.skip()
                last_update = time.monotonic()

    def stream_answer(self, request: Request, decoding: dict[str, Any]) -> Iterator[str | Answer]:
        """Yield the text whenever it has grown, at last the answer; count the answer's status."""
        status = "cancelled"
        try:
            self._check_request(request)
            with closing(self.engine.stream(request, **decoding)) as parts:
                for part in parts:
                    if isinstance(part, Answer):
                        status = part.status
                    yield part
        except (ValueError, OSError, RuntimeError) as error:
            # An AudioError is a ValueError and has a reason.
            status = getattr(error, "reason", "failed")
            yield Answer("", status, str(error))
        finally:
            self.counts[status] += 1

    def _check_request(self, request: Request) -> None:
        """Raise ValueError unless a request has a question and a clip that can be decoded."""
        if not request.audio or not (request.question or "").strip():
            raise ValueError("Give a clip and a question.")
        if len(request.question) + len(request.transcript or "") > MAX_CHARACTERS:
            raise ValueError(
                f"Question and transcript have more than {MAX_CHARACTERS:,} characters."
            )
        self.load_upload(request.audio)

    def predict(self, audio: str, question: str) -> str:
        """Return the text of an answer about an upload, from a model without transcripts.

        Raises:
            gr.Error: with the reason, if there is no answer.
        """
        return self.predict_with_transcript(audio, "", question)

    def predict_with_transcript(
        self, audio: str, transcript: str, question: str, llm_size: str = ""
    ) -> str:
        """Return the text of an answer.

        Args:
            audio: an upload.
            transcript: "" if the model is to transcribe the clip.
            question: the question about the clip.
            llm_size: has no effect, because a checkpoint has one language model; the original's
                demo has this parameter.

        Raises:
            gr.Error: with the reason, if there is no answer.
        """
        request = Request(
            question,
            audio,
            transcript or None,
            mode=self.args.mode,
            seed=self.args.seed,
            num_chunks=self.args.num_chunks,
        )
        *_, answer = self.stream_answer(request, read_decoding_flags(self.args))
        if not answer.answered:
            raise gr.Error(html.escape(f"{answer.status}: {answer.error}"), print_exception=False)
        return answer.text
