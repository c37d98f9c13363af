"""What clients send (pydantic models) and what they are answered (typed dicts).

Fields have OpenAI's names and meaning; those beyond its API have the names that other open servers
use, or, of the parallel reasoning, those of SamplingParams. null is the default everywhere. Fields
that would change the answer and are not supported are refused; others are ignored, and named in the
answer's header `X-Ignored-Fields`.
"""

from typing import Annotated, Any, Literal, NotRequired, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from typing_extensions import TypedDict

from npr_jax.decode.sampling import MOST_BIASES, MOST_LOGPROBS

_Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
_CountOrZero = Annotated[int, Field(ge=0, le=2**31 - 1)]
_TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Logprobs = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]
_Text = Annotated[str, Field(min_length=1)]
_Stops = Annotated[list[_Text], Field(max_length=16)]
_T = TypeVar("_T")
# Read up to what is wrong first: a list of a million wrong items has one error.
_List = Annotated[list[_T], Field(fail_fast=True)]
_SomeList = Annotated[list[_T], Field(fail_fast=True, min_length=1)]
_Bias = Annotated[float, Field(ge=-100, le=100)]


def _at_most(given: Any) -> Any:
    if isinstance(given, dict) and len(given) > MOST_BIASES:
        raise ValueError(f"{len(given)} entries, at most {MOST_BIASES} are allowed")
    return given


_few = BeforeValidator(_at_most)  # before each of them is looked at


class _Body(BaseModel):
    # Strict: "5" is no number. Unknown fields are kept to be named.
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    @property
    def ignored(self) -> str:
        """Names of fields that nothing here reads, for a header."""
        names = ", ".join(sorted(self.model_extra or ()))[:500]
        # No line ends, no controls; a header's value has no space around it either.
        return names.encode("unicode_escape").decode()[:500].strip()


class StreamOptions(_Body):
    """`include_usage`: a last piece says it; `continuous_usage_stats`: every piece does."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampling(_Body):
    """What all endpoints that decode take."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    # Beyond OpenAI's API:
    ignore_eos: bool | None = None
    min_tokens: _CountOrZero | None = None
    stop_token_ids: Annotated[list[_TokenId], Field(max_length=16)] | None = None
    parallel: bool | None = None
    max_branches: _Count | None = None
    max_depth: _CountOrZero | None = None
    stream_branches: bool | None = None


class _Choices(Sampling):
    """What chat and completions have in common."""

    n: _Count | None = None
    stop: _Text | _Stops | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: Annotated[dict[str, _Bias], _few] | None = None
    stream_options: StreamOptions | None = None


class CompletionRequest(_Choices):
    """Body of /v1/completions."""

    prompt: str | _List[str] | _List[_TokenId] | _List[_List[_TokenId]]
    max_tokens: _CountOrZero | None = None
    echo: bool | None = None
    logprobs: _Logprobs | None = None
    best_of: _Count | None = None
    suffix: str | None = None


class ContentPart(_Body):
    """A part of a message; text is all that is understood."""

    type: str
    text: str | None = None


class Message(_Body):
    """A message of a conversation."""

    role: _Text
    content: str | _List[ContentPart] | None = None


class ChatRequest(_Choices):
    """Body of /v1/chat/completions.

    `separate_reasoning`: the blocks go to `reasoning_content`; `instruction`: replaces the
    server's, which asks the last user's turn for the format ("" asks for none).
    """

    messages: _SomeList[Message]
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: _Logprobs | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    separate_reasoning: bool | None = None
    instruction: str | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    response_format: dict[str, Any] | None = None
    modalities: _List[str] | None = None
    audio: Any = None


class ResponsesRequest(Sampling):
    """Body of /v1/responses: text in, text out."""

    input: _Text | _SomeList[Message]
    instructions: str | None = None
    max_output_tokens: _Count | None = None
    instruction: str | None = None
    tools: list[Any] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    text: dict[str, Any] | None = None
    store: bool | None = None
    metadata: Annotated[dict[str, str], _few] | None = None  # which the answer repeats


class TokenizeRequest(_Body):
    """Body of /tokenize: a prompt, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: _SomeList[Message] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    instruction: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(_Body):
    """Body of /detokenize."""

    model: str | None = None
    tokens: _List[_TokenId]


# Answers.


class ErrorObject(TypedDict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(TypedDict):
    """Of any status but 200."""

    error: ErrorObject


class PromptDetails(TypedDict):
    """Of a prompt's tokens, those that were not computed again."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens of all choices. `critical_path`: the most that one of them had in a row, which are the
    decode steps that it takes."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    critical_path: int


class CompletionLogprobs(TypedDict):
    """Of each token: its text, log-prob, the likeliest beside it, and where its text begins."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class BranchEvent(TypedDict):
    """With `stream_branches`: what happened where. `branch`: (block, branch) on the way from the
    trunk, from 0. `position`: of the first token, of a fork and a join of the next one. `tokens`
    (id, text, logprob, forced): only of "tokens"; `branches`: only of "fork". `trace`, `viewer`:
    only of "finish", the answer as files of traces have it (docs/reports.md), and packed."""

    event: Literal["tokens", "fork", "join", "finish"]
    branch: list[list[int]]
    position: NotRequired[int]
    tokens: NotRequired[list[dict[str, Any]]]
    branches: NotRequired[int]
    trace: NotRequired[dict[str, Any]]
    viewer: NotRequired[dict[str, Any]]


class CompletionChoice(TypedDict):
    """One text. `finish_detail`: why, in the engine's own words."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    finish_detail: NotRequired[str]
    branch: NotRequired[BranchEvent]


class CompletionAnswer(TypedDict):
    """Of /v1/completions, and with `stream` each of its pieces."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class ChatLogprobs(TypedDict):
    """`content`: of each token {token, logprob, bytes, top_logprobs}."""

    content: list[dict[str, Any]]


class ChatMessage(TypedDict):
    """The assistant's."""

    role: Literal["assistant"]
    content: str
    reasoning_content: NotRequired[str]


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    finish_detail: NotRequired[str]


class ChatAnswer(TypedDict):
    """Of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(TypedDict):
    """`parallel`: whether it decodes branches; one without the tags is served sequentially."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    parallel: bool


class ModelList(TypedDict):
    """Of /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class ResponsesAnswer(TypedDict):
    """Of /v1/responses."""

    id: str
    object: Literal["response"]
    created_at: int
    status: str
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None
    error: ErrorObject | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    temperature: float | None
    top_p: float | None
    tools: list[Any]
    tool_choice: str
    parallel_tool_calls: bool
    metadata: dict[str, Any]
    store: bool


class TokenizeAnswer(TypedDict):
    """Of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(TypedDict):
    """Of /detokenize."""

    prompt: str


class TokenizerInfo(TypedDict):
    """Of /tokenizer_info."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None
    vocab_size: int
    model_max_length: int


class Health(TypedDict):
    """Of /health: "ok", or why no request is taken."""

    status: str


class Version(TypedDict):
    """Of /version. `weights`: how often they were swapped."""

    version: str
    weights: int


class Aborted(TypedDict):
    """Of DELETE /v1/requests/ID."""

    id: str
    object: Literal["request.aborted"]
    aborted: int


class Reloaded(TypedDict):
    """Of POST /v1/reload."""

    object: Literal["weights"]
    version: int
