"""Defines the bodies of requests and replies of the chat completions API.

They are those of OpenAI's API, restricted to what the server supports. Requests are validated
strictly: values are not converted to other types, null means that a field is absent, and an unknown
field is an error. Messages, their parts and `stream_options` may have unknown fields, such as
`name` and `cache_control`: clients send more of them, and they change no answer. FastAPI documents
the models at /docs.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_FIELDS = 100  # of an object in a request
MAX_TOKENS = 2**31 - 1  # of a request; --max_tokens is usually far less
StopSequence = Annotated[str, Field(min_length=1)]


# --- requests


class RequestModel(BaseModel):
    """An object inside the body of a request."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, fields: Any) -> Any:
        """Leave out the fields that are null, and refuse an object with very many fields.

        Pydantic collects the errors of all fields, which takes a kilobyte for each unknown one.
        Lists stop at their first error (`fail_fast`) for the same reason.
        """
        if not isinstance(fields, dict):
            return fields
        given = {name: value for name, value in fields.items() if value is not None}
        if len(given) > MAX_FIELDS:
            raise ValueError(f"an object has {len(given)} fields, and at most {MAX_FIELDS} here")
        return given


class LenientModel(RequestModel):
    """An object in which unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")


class TextPart(LenientModel):
    """A part of a message that is text."""

    type: Literal["text"]
    text: str


class RefusalPart(LenientModel):
    """A part of an earlier answer in which another model refused to answer: text."""

    type: Literal["refusal"]
    refusal: str


class InputAudio(LenientModel):
    """The file of a clip."""

    data: str = Field(description="The bytes of the file in base64, or a `data:` URL of them.")
    format: str = Field(
        "", description="Has no effect, because the file itself says which format it has."
    )


class AudioPart(LenientModel):
    """A part of a message that is a clip."""

    type: Literal["input_audio"]
    input_audio: InputAudio


class AudioUrl(LenientModel):
    """The file of a clip inside a URL."""

    url: str = Field(description="A `data:` URL in base64. No other URL is fetched.")


class AudioUrlPart(LenientModel):
    """A part of a message that is a clip, as clients of vLLM send it."""

    type: Literal["audio_url"]
    audio_url: AudioUrl

    @field_validator("audio_url", mode="before", json_schema_input_type=str | AudioUrl)
    @classmethod
    def make_text_an_object(cls, audio_url: Any) -> Any:
        """Convert a URL to an object that has it."""
        if isinstance(audio_url, str):
            return {"url": audio_url}
        return audio_url


MessagePart = Annotated[
    TextPart | RefusalPart | AudioPart | AudioUrlPart, Field(discriminator="type")
]


class ChatMessage(LenientModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[MessagePart] = Field(fail_fast=True)
    tool_calls: list = Field([], max_length=0, description="Not supported.")
    function_call: dict = Field({}, max_length=0, description="Not supported.")
    audio: dict = Field({}, max_length=0, description="Not supported.")

    @model_validator(mode="before")
    @classmethod
    def fill_empty_answer(cls, fields: Any) -> Any:
        """Let an earlier answer have no content; if the model refused, that text is its content."""
        if not isinstance(fields, dict) or fields.get("role") != "assistant":
            return fields
        if fields.get("content") is not None:
            return fields
        refusal = fields.get("refusal")
        content = refusal if isinstance(refusal, str) else ""
        return fields | {"content": content}

    @field_validator("content", mode="before", json_schema_input_type=str | list[MessagePart])
    @classmethod
    def make_text_a_part(cls, content: Any) -> Any:
        """Convert a text to a list with one part."""
        if isinstance(content, str):
            return [{"type": "text", "text": content}]
        return content


class StreamOptions(LenientModel):
    """Options of a streamed reply."""

    include_usage: bool = Field(
        False, description="End the stream with a chunk that has the numbers of tokens."
    )


class TextFormat(RequestModel):
    """The only format of an answer that is supported."""

    type: Literal["text"]


class UnsupportedFields(RequestModel):
    """Fields of OpenAI's API that are not supported, each with the value that changes no answer.

    Without tools, "auto" means "none".
    """

    n: Literal[1] = 1
    logprobs: Literal[False] = False
    top_logprobs: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    logit_bias: dict = Field({}, max_length=0)
    tools: list = Field([], max_length=0)
    tool_choice: Literal["none", "auto"] = "none"
    functions: list = Field([], max_length=0)
    function_call: Literal["none", "auto"] = "none"
    modalities: list[Literal["text"]] = Field(["text"], min_length=1, max_length=1, fail_fast=True)
    response_format: TextFormat = TextFormat(type="text")


class IgnoredFields(RequestModel):
    """Fields of OpenAI's API that change no answer, whatever their value."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    parallel_tool_calls: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    audio: Any = None  # The voice of an answer; `modalities` refuses such answers.
    reasoning_effort: Any = None
    verbosity: Any = None
    prediction: Any = None


class ChatCompletionRequest(UnsupportedFields, IgnoredFields):
    """A chat completion request.

    `transcript`, `mode`, `num_chunks`, `top_k` and `repetition_penalty` are not in OpenAI's API.
    """

    # In Python the two have defaults, so that a body without them gets the error of an unknown
    # model.
    model_config = ConfigDict(json_schema_extra={"required": ["model", "messages"]})

    model: str = Field("", description="The name of the model that is served.")
    messages: list[ChatMessage] = Field(
        [],
        fail_fast=True,
        description="A message of the user. Several turns and a system text need a model with the "
        "prompt template `chat`. One message may have a clip.",
    )
    stream: bool = Field(False, description="Send the answer as server-sent events while it grows.")
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="Former name of `max_completion_tokens`."
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="The maximum number of new tokens."
    )
    seed: int | None = Field(
        None,
        ge=-(2**63),
        lt=2**63,
        description="Seed of the random generator used for sampling. By default another one "
        "for each request; the reply contains it.",
    )
    stop: list[StopSequence] = Field(
        [],
        max_length=4,
        fail_fast=True,
        description="Texts at which an answer ends. They are not part of it.",
    )
    temperature: float | None = Field(
        None,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="The temperature of sampling, at most 100. With 0 decoding is greedy, and "
        "`top_p`, `top_k` and `seed` have no effect.",
    )
    top_p: float | None = Field(
        None,
        description="Sample from the most likely tokens whose probabilities add up to this: "
        "above 0, at most 1.",
    )
    top_k: int | None = Field(
        None, description="Sample from this number of most likely tokens; 0 for no limit."
    )
    repetition_penalty: float | None = Field(
        None,
        description="Penalty for tokens that occurred before: above 0, at most 100.",
    )
    transcript: str | None = Field(
        None,
        description="The transcript of the clip. By default LTU-AS transcribes it, and LTU has "
        "none.",
    )
    mode: Literal["joint", "audio_only", "asr_only"] | None = Field(
        None, description="Leave out the transcript (audio_only) or the audio (asr_only)."
    )
    num_chunks: int | None = Field(
        None, ge=0, description="The number of chunks of the clip to use; 0 or 'all' for all."
    )

    @field_validator("stop", mode="before", json_schema_input_type=str | list[StopSequence])
    @classmethod
    def make_stop_a_list(cls, stop: Any) -> Any:
        """Convert one text to a list with one text."""
        if isinstance(stop, str):
            return [stop]
        return stop

    @field_validator("num_chunks", mode="before", json_schema_input_type=int | Literal["all"])
    @classmethod
    def make_all_a_number(cls, num_chunks: Any) -> Any:
        """Convert "all" to 0."""
        if num_chunks == "all":
            return 0
        return num_chunks


# --- replies


class AnswerMessage(BaseModel):
    """The message that contains an answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The answer of a reply that is not streamed."""

    index: int = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: str = Field(description="stop or length.")


class Delta(BaseModel):
    """A piece of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """A piece of an answer in a chunk of a stream; the last one has a `finish_reason`."""

    index: int = 0
    delta: Delta
    logprobs: None = None
    finish_reason: str | None = None


class Usage(BaseModel):
    """Numbers of tokens; those of the prompt include audio tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class LtuFields(BaseModel):
    """What a reply says about the clip and the model, beyond OpenAI's API.

    `ltu.inference.requests.Answer` describes the fields. `seed` is that of sampling.
    """

    status: str
    warnings: list[str]
    seconds_heard: float
    seconds_total: float
    num_chunks: int
    transcript: str
    sampling_rate: int | None
    channels: int | None
    checkpoint: str
    seed: int


class ChatCompletion(BaseModel):
    """A reply that is not streamed."""

    id: str
    created: int = Field(description="Seconds since 1970.")
    model: str
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[Choice]
    usage: Usage
    ltu: LtuFields


class ChatCompletionChunk(BaseModel):
    """A chunk of a streamed reply."""

    id: str
    created: int
    model: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    usage: Usage | None = None
    ltu: LtuFields | None = None


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ltu"


class ModelList(BaseModel):
    """The models that are served: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """An error: a message for people, a code for programs, and the field that caused it."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The body of a reply with an error."""

    error: ErrorDetail
