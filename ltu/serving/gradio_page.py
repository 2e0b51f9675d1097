"""The page in the browser to ask about clips, and its endpoint `/predict`, which the original's demo had.

A clip is an upload, never a path or an address in a request. Uploads are in a folder that is removed
with the process, and nothing is logged but how many questions ended how.
"""

import argparse
import base64
import html
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from matplotlib.image import imsave
from starlette.middleware import Middleware

from ltu.data.audio import AudioError, Waveform, decode_audio
from ltu.inference.engine import LtuEngine
from ltu.inference.generation_flags import read_decoding_flags
from ltu.inference.requests import Answer, Request
from ltu.inference.sampling import GREEDY_DECODING, ORIGINAL_DECODING

TITLES = {
    "ltu": "LTU: Listen, Think, and Understand",
    "ltu_as": "LTU-AS: Joint Audio and Speech Understanding",
}
FIRST = "What can be inferred from the audio?"
PRESETS = f"{FIRST}|Which sounds are there? Give labels.|Describe the clip in one sentence.|"
PRESETS += "What comes first, what later?|Where could this be, and why?"
ABOUT_SPEECH = "|What is said?|How old is the speaker, and which gender?|How does the speaker feel, and what tells you?"
EXAMPLES = "dog_96827b rain_41d8e2 siren_4e843a church_bell_f43a7a drum_beat_7a32dd woman_speaking_e2f0fe allison_24"
TOY_SET = Path(__file__).parents[2] / "data" / "toy"  # Not in an installed package.
MAX_NEW_TOKENS, MAX_TEXT, MAX_WAITING, COLUMNS = (
    1024,
    8000,
    32,
    1200,
)  # characters; in the queue; of the picture
REDRAWN = 0.05  # seconds: a browser that draws each token of a fast model is too busy for clicks
BAD = "<div class='bad'>{}</div>"
IDLE, BUSY = (
    [gr.update(interactive=can) for can in both] for both in ((True, False), (False, True))
)  # Ask, Stop
# What browsers may load: Gradio 6.0's page names a script of another host.
OWN_SOURCES = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
CSS = """
.mel { position: relative; height: 132px; border-radius: 6px; overflow: hidden; background: #000004 }
.mel img { width: 100%; height: 100%; object-fit: fill; margin: 0 }
.mel div { position: absolute; inset: 0 auto 0 0; border: 2px solid var(--color-accent); border-radius: 6px }
.mel .rest { inset: 0 0 0 auto; border: 0; background: rgb(90 90 90 / 80%); color: #fff; display: flex;
  align-items: center; justify-content: center; overflow: hidden; font-size: 13px; white-space: nowrap }
.axis { display: flex; justify-content: space-between; font-size: 12px; color: var(--body-text-color-subdued) }
.bad { border-left: 4px solid #dc2626; padding: 4px 10px; overflow-wrap: anywhere }
.presets { flex-wrap: wrap; gap: 6px }
.presets button { flex: 0 1 auto; min-width: 0; min-height: 34px; font-size: 14px; white-space: normal }
"""


class Demo:
    """What the page does. `args` are the flags of `main`."""

    def __init__(self, engine: LtuEngine, args: argparse.Namespace):
        self.engine, self.processor, self.args = engine, engine.processor, args
        self.counts: Counter[str] = Counter()
        self.settings: dict[str, Any] = {}  # of an answer -> what it is chosen with

    def read(self, path: str) -> Waveform:
        """An upload that is no longer than --max_seconds. Raises AudioError, which names it without its folder."""
        try:
            if (
                not Path(path)
                .resolve()
                .is_relative_to(Path(gr.utils.get_upload_folder()).resolve())
            ):
                raise AudioError(path, "missing", "is no upload")
            return decode_audio(path, self.args.max_seconds)
        except AudioError as error:
            raise AudioError(Path(path).name, error.reason, error.detail) from None

    def show(self, path: str | None, num_chunks: int | None) -> str:
        """What is heard of an upload, or why it is not, as HTML."""
        if path is None:
            return ""
        try:
            sound = self.read(path)
        except AudioError as error:
            return BAD.format(html.escape(f"{error.reason}: {error}"))
        extractor, samples = self.processor.feature_extractor, len(sound.waveform)
        seconds, there = samples / extractor.sampling_rate, extractor.count_chunks(samples)
        heard = min(seconds, min(num_chunks or there, there) * extractor.chunk_seconds)
        mels = extractor.extract_chunks(
            torch.from_numpy(sound.waveform), there
        )  # (chunks, frames, bins), or bins first
        mels = (
            (mels if mels.shape[1] == extractor.num_frames else mels.transpose(1, 2))
            .flatten(0, 1)
            .float()
        )
        mels = mels[
            : max(1, int((seconds - 0.015) / extractor.chunk_seconds * extractor.num_frames))
        ].T
        mels = torch.nn.functional.interpolate(
            mels[None], min(COLUMNS, mels.shape[1]), mode="area"
        )[0]  # (bins, _)
        imsave(
            file := io.BytesIO(),
            mels.numpy(),
            vmin=mels.quantile(0.02).item(),
            cmap="magma",
            origin="lower",
        )
        data, share = base64.b64encode(file.getvalue()).decode(), 100 * heard / seconds
        rest = (
            f"<div class='rest' style='left:{share:.2f}%'>not heard</div>" if share < 99.8 else ""
        )
        channels = (
            "1 channel"
            if sound.channels == 1
            else f"{sound.channels} channels, of which the first is heard"
        )
        return (
            f"<div class='mel'><img alt='log-mel spectrogram of the clip' src='data:image/png;base64,{data}'>"
            f"<div style='width:{share:.2f}%'></div>{rest}</div><div class='axis'><span>0 s</span><span>{seconds:.2f} s"
            f"</span></div>Heard: {heard:.2f} of {seconds:.2f} s. The file: {sound.sampling_rate:,} Hz, {channels}."
        )

    def change_clip(self, path: str | None, num_chunks: int | None) -> Iterator[tuple]:
        """A clip has come or gone: its picture, an empty chat, its transcript and the clip that this is of."""
        shown = self.show(path, num_chunks)
        will_write = self.processor.transcribes and "class='mel'" in shown
        yield (
            shown,
            [],
            [],
            "",
            gr.update(value="", placeholder="transcribing ..." if will_write else ""),
            None,
        )
        if will_write:
            clip = self.engine.cache.encode([Request("", path, num_chunks=num_chunks)])[0]
            yield (
                shown,
                [],
                [],
                "",
                gr.update(value=getattr(clip, "transcript", ""), placeholder="no words"),
                path,
            )

    def ask(
        self, path: str | None, question: str, turns: list, words: str, words_of: str, *chosen: Any
    ) -> Iterator:
        """The chat while one more answer grows. `words` are as they stand on the page, made of the clip `words_of`."""
        settings = read_decoding_flags(self.args) | dict(zip(self.settings, chosen, strict=True))
        seed, num_chunks = int(settings.pop("seed") or 0), int(settings.pop("num_chunks") or 0)
        known = words if words_of == path or not self.processor.transcribes else None
        request = Request(
            question, path, known, mode=self.args.mode, seed=seed, num_chunks=num_chunks
        )
        turns = [
            *turns,
            {"role": "user", "content": question},
            {"role": "assistant", "content": ""},
        ]
        yield turns, turns, "listening ...", *BUSY
        drawn = 0.0
        for part in self.answers(request, settings):
            is_last = isinstance(part, Answer)
            if is_last or time.monotonic() - drawn > REDRAWN:
                text = (part.text if part.answered else "(no answer)") if is_last else part
                turns = [*turns[:-1], {"role": "assistant", "content": text}]
                # What is the same is not sent: it might come after what Stop says.
                yield turns, turns, *((ending(part), *IDLE) if is_last else [gr.skip()] * 3)
                drawn = time.monotonic()

    def answers(self, request: Request, decoding: dict) -> Iterator[str | Answer]:
        """The text so far, again and again, at last the answer; how it ended is counted."""
        ended = "cancelled"
        try:
            if not request.audio or not (request.question or "").strip():
                raise ValueError("Give a clip and a question.")
            if len(request.question) + len(request.transcript or "") > MAX_TEXT:
                raise ValueError(f"Question and transcript have more than {MAX_TEXT:,} characters.")
            self.read(request.audio)
            with closing(self.engine.stream(request, **decoding)) as parts:
                for part in parts:
                    ended = part.status if isinstance(part, Answer) else ended
                    yield part
        except (ValueError, OSError, RuntimeError) as error:  # AudioError is one, with a reason.
            ended = getattr(error, "reason", "failed")
            yield Answer("", ended, str(error))
        finally:
            self.counts[ended] += 1

    def predict(self, audio: str, transcript: str, question: str, llm_size: str = "") -> str:
        """The answer alone, or gr.Error with the reason. `llm_size` changes nothing: a checkpoint has one model."""
        given = {"mode": self.args.mode, "seed": self.args.seed, "num_chunks": self.args.num_chunks}
        *_, answer = self.answers(
            Request(question, audio, transcript or None, **given), read_decoding_flags(self.args)
        )
        if not answer.answered:
            raise gr.Error(html.escape(f"{answer.status}: {answer.error}"), print_exception=False)
        return answer.text

    def build(self) -> gr.Blocks:
        """The page."""
        kind, hidden = self.engine.kind, {"api_visibility": "private"}
        one = {"concurrency_id": "model", "concurrency_limit": 1}
        with gr.Blocks(
            title=TITLES[kind], analytics_enabled=False, delete_cache=(300, 3600)
        ) as page:
            gr.HTML(
                f"<h1>{TITLES[kind]}</h1>{html.escape(Path(self.args.model).name)} {self.engine.checkpoint[:12]}"
            )
            with gr.Row():
                with gr.Column(min_width=320):
                    clip = gr.Audio(
                        type="filepath", buttons=["download"], label="Clip", elem_id="clip"
                    )
                    take_uploads_only(clip)
                    shown = gr.HTML(elem_id="picture")
                    label, is_there = (
                        "Transcript, read beside the sound: correct it, or empty it",
                        kind == "ltu_as",
                    )
                    words = gr.Textbox(label=label, lines=2, elem_id="words", visible=is_there)
                    files = [
                        file for name in EXAMPLES.split() for file in TOY_SET.glob(f"*/{name}.flac")
                    ]
                    if files:
                        names = [file.stem.rpartition("_")[0].replace("_", " ") for file in files]
                        gr.Examples(
                            [[str(file)] for file in files], [clip], example_labels=names, **hidden
                        )
                with gr.Column(min_width=320):
                    note = "Each question is asked about the clip by itself: the model sees no earlier one."
                    look = {
                        "height": 380,
                        "render_markdown": False,
                        "placeholder": note,
                        "buttons": ["copy_all"],
                    }
                    chat = gr.Chatbot(label="Questions about this clip", elem_id="chat", **look)
                    status = gr.HTML(elem_id="status")
                    question = gr.Textbox(FIRST, label="Question", max_lines=6, elem_id="question")
                    with gr.Row():
                        ask = gr.Button("Ask", variant="primary", min_width=80, elem_id="ask")
                        stop = gr.Button("Stop", interactive=False, min_width=80, elem_id="stop")
                    with gr.Row(elem_classes="presets"):
                        for text in (PRESETS + ABOUT_SPEECH * (kind == "ltu_as")).split("|"):
                            gr.Button(text, size="sm").click(
                                None, outputs=question, js=f"() => {json.dumps(text)}"
                            )
                    with gr.Accordion("Sampling, length, chunks", open=False, elem_id="settings"):
                        self._build_settings()
            words_of, turns, num_chunks = gr.State(None), gr.State([]), self.settings["num_chunks"]
            heard, told = (
                [shown, chat, turns, status, words, words_of],
                [chat, turns, status, ask, stop],
            )
            num_chunks.change(
                self.show, [clip, num_chunks], shown, show_progress="hidden", **hidden
            )
            clip.change(
                self.change_clip, [clip, num_chunks], heard, show_progress="hidden", **one, **hidden
            )
            inputs = [clip, question, turns, words, words_of, *self.settings.values()]
            asked = gr.on(
                [ask.click, question.submit],
                self.ask,
                inputs,
                told,
                show_progress="hidden",
                **one,
                **hidden,
            )
            chat.clear(list, outputs=turns, queue=False, **hidden)
            stop.click(
                lambda: ("stopped", *IDLE), None, told[2:], cancels=[asked], queue=False, **hidden
            )
            # `/predict` has the parameters of the original's demo of this kind.
            size, answer = (
                gr.Textbox("7B (Default)", visible=False),
                gr.Textbox(label="Answer", visible=False),
            )
            function, inputs = self.predict, [clip, words, question, size]
            if kind == "ltu":
                function, inputs = (
                    lambda audio, question: self.predict(audio, "", question),
                    [clip, question],
                )
            gr.Button(visible=False).click(function, inputs, answer, api_name="predict", **one)
        return page.queue(max_size=MAX_WAITING)

    def launch(self, **more: Any) -> gr.Blocks:
        """Open the page; returns once it is closed, unless `more` tells gr.Blocks.launch otherwise."""
        args, page = self.args, self.build()
        theme = gr.themes.Default(
            primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"]
        )
        # A shared page has its scripts from Gradio's host.
        safe = {
            "app_kwargs": {} if args.share else {"middleware": [Middleware(with_own_sources)]},
            "ssr_mode": False,
        }
        place = {
            "server_name": args.host,
            "server_port": args.port,
            "share": args.share,
            "theme": theme,
            "css": CSS,
        }
        page.launch(
            max_file_size=args.max_mb * 2**20,
            footer_links=["api", "settings"],
            **place,
            **safe,
            **more,
        )
        return page

    def _build_settings(self) -> None:
        start = (
            ORIGINAL_DECODING
            | GREEDY_DECODING
            | {"repetition_penalty": 1.0}
            | read_decoding_flags(self.args)
        )
        self.settings["do_sample"] = gr.Checkbox(
            start["do_sample"], label="Sample (else greedy)", elem_id="do_sample"
        )
        for name, least, most, step, label in (
            ("temperature", 0.05, 2, 0.05, "Temperature, of sampling"),
            ("top_p", 0.05, 1, 0.05, "Top-p, of sampling"),
            ("top_k", 0, 1000, 1, "Top-k, of sampling (0: no limit)"),
            ("repetition_penalty", 1, 2, 0.05, "Repetition penalty"),
            ("max_new_tokens", 1, MAX_NEW_TOKENS, 1, "Tokens of an answer, at most"),
        ):
            ends = min(least, start[name]), max(most, start[name])  # The flags may go further.
            self.settings[name] = gr.Slider(
                *ends, start[name], step=step, label=label, elem_id=name
            )
        self.settings["seed"] = gr.Number(
            self.args.seed, precision=0, minimum=0, label="Seed, of sampling"
        )
        label = f"Windows of {self.processor.feature_extractor.chunk_seconds:g} s that are heard (0: all of the clip)"
        self.settings["num_chunks"] = gr.Number(
            self.args.num_chunks, precision=0, minimum=0, label=label, elem_id="num_chunks"
        )


def take_uploads_only(clip: gr.Audio) -> None:
    """Gradio checks that a path is an upload; here an address, which it would fetch, is refused too."""
    move = clip.async_move_resource_to_block_cache

    async def move_upload(place: str | Path | None) -> str | None:
        if place is not None and "://" in str(place):
            raise gr.Error(
                "Upload the clip: an address is not fetched here.", print_exception=False
            )
        return await move(place)

    clip.async_move_resource_to_block_cache = move_upload


def with_own_sources(app: Callable) -> Callable:
    """Middleware that tells browsers to load nothing from other hosts."""

    async def answer(scope: dict, receive: Callable, send: Callable) -> None:
        async def send_more(message: dict) -> None:
            more = (
                [(b"content-security-policy", OWN_SOURCES)]
                if message["type"] == "http.response.start"
                else []
            )
            await send(message | ({"headers": [*message["headers"], *more]} if more else {}))

        await app(scope, receive, send_more)

    return answer


def ending(answer: Answer) -> str:
    """What is to be said about an answer, as HTML."""
    if not answer.answered:
        return BAD.format(html.escape(f"{answer.status}: {answer.error}"))
    how = {"length": ", cut there", "cancelled": ", stopped"}.get(answer.finish_reason, "")
    heard = f"heard {answer.seconds_heard:.2f} of {answer.seconds_total:.2f} s"
    return f"{answer.status}: {heard} · {answer.new_tokens} tokens{how} · {answer.seconds:.1f} s"
