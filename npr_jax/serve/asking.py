"""From the body of a request to what the engine is asked: token ids and SamplingParams."""

import dataclasses
import random
import re
from collections import abc

from npr_jax.data.prompts import begun, chat_ids, prompt_ids
from npr_jax.decode import EngineConfig, SamplingParams
from npr_jax.model.pretrained import Model
from npr_jax.model.tokenizer import encode
from npr_jax.serve.config import ServeConfig
from npr_jax.serve.errors import ApiError
from npr_jax.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    Message,
    ResponsesRequest,
    Sampling,
    TokenizeRequest,
)

_MAX_TOKENS = {
    CompletionRequest: "max_tokens",
    ChatRequest: "max_completion_tokens",
    ResponsesRequest: "max_output_tokens",
}


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a request asks of the engine, and how its answer is told.

    `added` of every prompt: the beginning-of-text token that the client did not send, which an echo
    leaves out; `texts`: the prompts as text, for an echo; `logprobs`: how many likeliest beside
    each token's, None for no log-probs; `max_tokens`: 0 asks for the prompt alone.
    """

    prompts: list[list[int]]
    sampling: SamplingParams
    max_tokens: int
    stream: bool
    branches: bool
    usage_last: bool = False
    usage_always: bool = False
    logprobs: int | None = None
    echo: bool = False
    added: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    separate: bool = False


_PROMPT = {CompletionRequest: "prompt", ChatRequest: "messages", ResponsesRequest: "input"}


class Asker:
    """Reads bodies for one model; raises ApiError for what cannot be done."""

    def __init__(self, model: Model, config: ServeConfig, name: str):
        assert model.tokenizer is not None
        self.tokenizer, self.config, self.name = model.tokenizer, config, name
        self.parallel = model.tags is not None
        self.vocab_size = model.config.vocab_size
        limit = model.config.max_position_embeddings
        room = (config.engine.longest_table - 1) * config.engine.page_size
        # Tokens of a prompt and one path of its answer.
        self.longest = min(limit, config.sampling.max_position or limit, room)
        # No text of more characters has so few tokens.
        self.most_text = self.longest * max(map(len, self.tokenizer.get_vocab()))

    def check_model(self, name: str | None) -> None:
        """Refuses another model than the one that is here."""
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"The model {name!r} does not exist; {self.name!r} is served here.",
                "model",
                "model_not_found",
            )

    def completion(self, body: CompletionRequest) -> Asked:
        """What /v1/completions asks for."""
        if body.suffix:
            raise _unsupported("suffix")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise _unsupported("best_of", "other than n ")
        if body.echo and body.stream_branches:
            raise ApiError(400, "stream_branches cannot be combined with echo.", "stream_branches")
        given = self._prompts(body.prompt)
        prompts, added = [], []
        for number, prompt in enumerate(given):
            name = f"prompt[{number}]" if len(given) > 1 else "prompt"
            if isinstance(prompt, str):
                self._refuse_endless(len(prompt), name)
                sent = self._encode(prompt, name)
            else:
                sent = self._ids(prompt, name)
            ids = begun(self.tokenizer, sent)
            if not ids:
                raise ApiError(400, f"{name} is empty, needed is at least one token.", "prompt")
            prompts.append(ids)
            added.append(len(ids) - len(sent))
        max_tokens = 16 if body.max_tokens is None else body.max_tokens
        if not max_tokens and not body.echo:
            raise ApiError(400, "max_tokens is 0, needed is 1 or more without echo.", "max_tokens")
        echoed = body.logprobs if body.echo else None
        sampling = self._sampling(body, prompts, max_tokens, body.logprobs, echoed)
        texts = tuple(
            prompt if isinstance(prompt, str) else self.decode(prompt)
            for prompt in (given if body.echo else ())
        )
        return Asked(
            prompts,
            sampling,
            max_tokens,
            logprobs=body.logprobs,
            echo=bool(body.echo),
            added=tuple(added),
            texts=texts,
            **_streaming(body),
        )

    def chat(self, body: ChatRequest) -> Asked:
        """What /v1/chat/completions asks for."""
        for name, off in (
            ("tools", bool(body.tools) and body.tool_choice != "none"),
            ("functions", bool(body.functions)),
            ("audio", body.audio is not None),
            ("modalities", body.modalities not in (None, [], ["text"])),
            (
                "response_format",
                bool(body.response_format) and body.response_format != {"type": "text"},
            ),
        ):
            if off:
                raise _unsupported(name)
        if body.separate_reasoning and body.stream_branches:
            raise ApiError(
                400,
                "separate_reasoning cannot be combined with stream_branches.",
                "separate_reasoning",
            )
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true.", "top_logprobs")
        prompt = self.chat_prompt(body.messages, body.instruction, body.chat_template_kwargs)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        limit = body.max_completion_tokens or body.max_tokens
        sampling = self._sampling(body, [prompt], limit, logprobs)
        return Asked(
            [prompt],
            sampling,
            sampling.max_tokens,
            logprobs=logprobs,
            separate=bool(body.separate_reasoning),
            **_streaming(body),
        )

    def responses(self, body: ResponsesRequest) -> Asked:
        """What /v1/responses asks for."""
        kind = ((body.text or {}).get("format") or {"type": "text"}).get("type")
        for name, off in (
            ("tools", bool(body.tools)),
            ("previous_response_id", body.previous_response_id is not None),
            ("conversation", body.conversation is not None),
            ("background", bool(body.background)),
            ("text.format", kind != "text"),
            ("stream_branches", bool(body.stream_branches)),
        ):
            if off:
                raise _unsupported(name)
        turns = body.input
        if isinstance(turns, str):
            turns = [Message(role="user", content=turns)]
        if body.instructions:
            turns = [Message(role="system", content=body.instructions), *turns]
        prompt = self.chat_prompt(turns, body.instruction, name="input")
        sampling = self._sampling(body, [prompt], body.max_output_tokens)
        stream = bool(body.stream)
        return Asked([prompt], sampling, sampling.max_tokens, stream=stream, branches=False)

    def tokenize(self, body: TokenizeRequest) -> list[int]:
        """What /tokenize asks for."""
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "Needed is either prompt or messages.", "prompt")
        if body.messages is not None:
            return self.chat_prompt(body.messages, body.instruction, body.chat_template_kwargs)
        assert body.prompt is not None
        ids = self._encode(body.prompt, "prompt")
        return ids if body.add_special_tokens is False else begun(self.tokenizer, ids)

    def detokenize(self, tokens: list[int]) -> str:
        """The text of ids."""
        return self.decode(self._ids(tokens, "tokens"))

    def decode(self, ids: abc.Sequence[int]) -> str:
        """The text of ids, as the engine decodes."""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def chat_prompt(
        self,
        messages: abc.Sequence[Message],
        instruction: str | None = None,
        options: dict | None = None,
        name: str = "messages",
    ) -> list[int]:
        """The ids of a conversation; its last user's turn gets the instruction."""
        turns = [{"role": m.role, "content": _text(m, i, name)} for i, m in enumerate(messages)]
        self._refuse_endless(sum(len(turn["content"]) for turn in turns), name)
        if turns[-1]["role"] == "assistant":
            raise ApiError(
                400, f"The last of {name} is the assistant's, needed is another's.", name
            )
        for turn in turns:  # "developer" is OpenAI's newer name of it
            turn["role"] = "system" if turn["role"] == "developer" else turn["role"]
        if instruction is None:
            instruction = self.config.instruction if self.parallel else ""
        try:
            if self.tokenizer.chat_template:
                users = [turn for turn in turns if turn["role"] == "user"]
                if users and instruction:
                    users[-1]["content"] += f"\n\n{instruction}"
                reserved = {"conversation", "messages", "tokenize", "add_generation_prompt"}
                if bad := sorted(reserved & set(options or ())):
                    raise ApiError(
                        400, f"chat_template_kwargs cannot set {bad[0]}.", "chat_template_kwargs"
                    )
                return chat_ids(self.tokenizer, turns, name, **(options or {}))
            if len(turns) > 1 or turns[0]["role"] != "user":
                raise ApiError(
                    400,
                    "The model's tokenizer has no chat template, so one message of the user is "
                    f"all that it can be asked; {name} has {len(turns)}.",
                    name,
                )
            return prompt_ids(self.tokenizer, turns[0]["content"])
        except (ValueError, TypeError) as error:
            raise ApiError(400, str(error), name) from error

    def _prompts(self, given) -> list:
        """A list of prompts, each a text or ids."""
        if isinstance(given, str):
            return [given]
        if not given:
            raise ApiError(400, "prompt is empty, needed is a text or token ids.", "prompt")
        if isinstance(given[0], int):
            return [given]
        if len(given) > self.config.max_prompts:
            raise ApiError(
                400,
                f"prompt has {len(given)} prompts, at most {self.config.max_prompts} are allowed.",
                "prompt",
            )
        return given

    def _refuse_endless(self, characters: int, name: str) -> None:
        """Refuses, before it is encoded, what can only be too long."""
        if characters > self.most_text:
            raise ApiError(
                400,
                f"This model's maximum context length is {self.longest} tokens, and {name} has "
                f"{characters} characters, at most {self.most_text} can be read: shorten it.",
                name.split("[")[0],
                "context_length_exceeded",
            )

    def _encode(self, text: str, name: str) -> list[int]:
        try:
            return encode(self.tokenizer, text)
        except ValueError as error:
            raise ApiError(400, f"{name}: {error}", name.split("[")[0]) from error

    def _ids(self, ids: list[int], name: str) -> list[int]:
        if ids and max(ids) >= self.vocab_size:
            raise ApiError(
                400,
                f"{name} holds {max(ids)}, needed are token ids below {self.vocab_size}.",
                name.split("[")[0],
            )
        return ids

    def _sampling(
        self,
        body: Sampling,
        prompts: list[list[int]],
        max_tokens: int | None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """The server's defaults, but for what the request says."""
        longest = max(map(len, prompts))
        if longest >= self.longest:
            name = _PROMPT[type(body)]
            raise ApiError(
                400,
                f"This model's maximum context length is {self.longest} tokens, and {name} has "
                f"{longest}: shorten it.",
                name,
                "context_length_exceeded",
            )
        most = self.config.max_tokens or 2**31 - 1
        if max_tokens is not None and max_tokens > most:
            name = _MAX_TOKENS[type(body)]
            raise ApiError(400, f"{name} is {max_tokens}, at most {most} are allowed here.", name)
        if max_tokens is None:
            max_tokens = min(most, self.config.sampling.max_tokens, self.longest - longest)
        own = body if isinstance(body, (CompletionRequest, ChatRequest)) else None
        n = (own and own.n) or 1
        if n > self.config.max_choices:
            raise ApiError(400, f"n is {n}, at most {self.config.max_choices} is allowed.", "n")
        if len(prompts) * n > self.config.max_requests:
            raise ApiError(
                400,
                f"{len(prompts)} prompts with n={n} are more than the {self.config.max_requests} "
                "answers that may be asked for at a time.",
                "n",
            )
        seed = random.getrandbits(32) if body.seed is None else body.seed % 2**32
        parallel = self.parallel if body.parallel is None else body.parallel
        if parallel and not self.parallel:
            raise ApiError(
                400,
                f"parallel is true, but {self.name!r} has no tags for branches: it is served "
                "sequentially.",
                "parallel",
            )
        given = {
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k and max(body.top_k, 0),
            "min_p": body.min_p,
            "repetition_penalty": body.repetition_penalty,
            "ignore_eos": body.ignore_eos,
            "min_tokens": body.min_tokens,
            "max_branches": self._at_most("max_branches", body.max_branches, self.config.engine),
            "max_depth": self._at_most("max_depth", body.max_depth, self.config.engine),
            "presence_penalty": own and own.presence_penalty,
            "frequency_penalty": own and own.frequency_penalty,
            "stop_token_ids": None if body.stop_token_ids is None else tuple(body.stop_token_ids),
            "stop": _stops(own and own.stop),
            "logit_bias": self._bias(own and own.logit_bias),
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs,
        }
        if (body.min_tokens or 0) > max(max_tokens, 1):
            raise ApiError(
                400,
                f"min_tokens is {body.min_tokens}, above max_tokens={max_tokens}.",
                "min_tokens",
            )
        changes = {name: value for name, value in given.items() if value is not None}
        if body.repetition_penalty is not None:
            changes["step_repetition_penalty"] = None  # else a default of steps would stay
        try:
            return dataclasses.replace(
                self.config.sampling,
                seed=seed,
                n=n,
                parallel=parallel,
                max_tokens=max(max_tokens, 1),
                max_position=self.longest,  # also where it is pages that there are no more of
                **changes,
            )
        except ValueError as error:
            raise refused(error) from error

    @staticmethod
    def _at_most(name: str, asked: int | None, engine: EngineConfig) -> int | None:
        limit = getattr(engine, name)
        if asked is not None and asked > limit:
            raise ApiError(400, f"{name} is {asked}, at most {limit} is allowed here.", name)
        return asked

    def _bias(self, given: dict[str, float] | None) -> tuple[tuple[int, float], ...] | None:
        if given is None:
            return None
        found = {}
        for token, bias in given.items():
            if not (token.isascii() and token.isdigit() and len(token) < 10):
                raise ApiError(400, f"logit_bias names {token!r}, needed are ids.", "logit_bias")
            if int(token) >= self.vocab_size:
                raise ApiError(
                    400,
                    f"logit_bias names {token}, needed are ids below {self.vocab_size}.",
                    "logit_bias",
                )
            found[int(token)] = float(bias)
        if len(found) > self.config.engine.max_logit_bias:
            raise ApiError(
                400,
                f"logit_bias has {len(found)} tokens, at most {self.config.engine.max_logit_bias} "
                "are allowed.",
                "logit_bias",
            )
        return tuple(found.items())


def _streaming(body) -> dict:
    """What a body says about pieces."""
    options = body.stream_options
    if options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream=true.", "stream_options")
    if body.stream_branches and not body.stream:
        raise ApiError(400, "stream_branches needs stream=true.", "stream_branches")
    return {
        "stream": bool(body.stream),
        "branches": bool(body.stream_branches),
        "usage_last": bool(options and options.include_usage),
        "usage_always": bool(options and options.include_usage and options.continuous_usage_stats),
    }


def _stops(given: str | list[str] | None) -> tuple[str, ...] | None:
    if given is None:
        return None
    return (given,) if isinstance(given, str) else tuple(given)


def _text(message: Message, number: int, name: str) -> str:
    """The text of a message."""
    for field in ("tool_calls", "function_call"):
        if (message.model_extra or {}).get(field):
            raise _unsupported(field, f"in {name}[{number}] ", name)
    content = message.content
    if isinstance(content, str):
        return content
    if content is None:
        if message.role == "assistant":
            return ""  # it called a tool
        raise ApiError(400, f"{name}[{number}].content is null, needed is text.", name)
    for part in content:
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise ApiError(
                400,
                f"{name}[{number}].content has a part of type {part.type!r}, only text is "
                "supported.",
                name,
            )
    return "".join(part.text or "" for part in content)


def _unsupported(name: str, how: str = "", param: str | None = None) -> ApiError:
    text = f"{name} {how}is not supported here."
    return ApiError(400, text, param or name, "unsupported_parameter")


def refused(error: ValueError) -> ApiError:
    """What the engine does not take; it calls its settings as requests do."""
    words = set(re.findall(r"\w+", str(error)))
    names = (field.name for field in dataclasses.fields(SamplingParams))
    return ApiError(400, f"{error}.", next((name for name in names if name in words), None))
