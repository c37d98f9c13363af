"""From the engine's events to what a client is answered: choices, log-probs, usage, traces."""

import dataclasses
import functools
import json
import math
import time
from collections import abc
from typing import Any, NamedTuple

from npr_jax.answers import extract
from npr_jax.data.sources import Problem
from npr_jax.decode import Engine, Event, Trajectory
from npr_jax.decode.outputs import TRUNCATED
from npr_jax.decode.sequence import PromptScores
from npr_jax.evaluate.judge import Answer, violations
from npr_jax.evaluate.traces import make_trace
from npr_jax.report.content import pack, row_of
from npr_jax.serve.asking import Asked, Asker
from npr_jax.serve.errors import ApiError
from npr_jax.serve.order import Order, Reasoning
from npr_jax.serve.protocol import BranchEvent, ChatLogprobs, CompletionLogprobs, Usage
from npr_jax.tree import TagIds

_SMALLEST = -9999.0  # JSON has no infinity


class Said(NamedTuple):
    """What a choice says with one piece of a stream, or at once: tokens, and their text, of which
    `reasoning` is told apart where that is asked for."""

    tokens: list[Event]
    lengths: list[int]
    text: str
    reasoning: str


class Choice:
    """One answer in the making, as a client sees it.

    Attributes:
      index: of the choice; `prompt`: of its prompt.
      length: characters of its text that were given out; `tokens`: of the response so far.
      trajectory: once it has finished.
      prompt_scores: the log-probs of the prompt, where they are asked for.
    """

    def __init__(self, index: int, asked: Asked, ends: frozenset[int], tags: TagIds | None):
        self.index, self.prompt = index, index // asked.sampling.n
        self.order = Order(len(asked.prompts[self.prompt]), ends, tags)
        self.length = self.tokens = 0
        self.trajectory: Trajectory | None = None
        self.prompt_scores: PromptScores | None = None
        self._reasoning = Reasoning(tags) if asked.separate else None
        self._mute = not asked.max_tokens  # the prompt alone is asked for
        self._rest = ""

    def hear(self, event: Event) -> None:
        """Takes what happened to it."""
        if event.kind == "prompt":
            self.prompt_scores = event.prompt
            return
        self.order.hear(event)
        self.tokens += event.kind == "token" and not self._mute
        if event.kind == "finish":
            self.trajectory, self._rest = event.trajectory, event.text or ""

    def say(self) -> Said:
        """What has its turn since the last call."""
        pieces = [] if self._mute else self.order.take()
        rest = self.rest()
        said = Said([p.token for p in pieces], [len(p.text) for p in pieces], "", "")
        if self._reasoning is None:
            return said._replace(text="".join(p.text for p in pieces) + rest)
        parts = [self._reasoning.add(piece) for piece in pieces]
        if self.trajectory is not None:
            parts.append(self._reasoning.flush(rest))
        reasoning, text = (
            ("".join(some) for some in zip(*parts, strict=True)) if parts else ("", "")
        )
        return said._replace(text=text, reasoning=reasoning)

    def rest(self) -> str:
        """What comes with the finish: of a character that the answer ends inside."""
        rest, self._rest = "" if self._mute else self._rest, ""
        return rest

    @property
    def finish_reason(self) -> str | None:
        """In OpenAI's words; None while it goes on."""
        if self.trajectory is None:
            return None
        reason = self.trajectory.finish_reason
        if reason in TRUNCATED or self._mute:
            return "length"
        return "abort" if reason == "aborted" else "stop"

    @property
    def finish(self) -> dict[str, Any]:
        """The end of a choice: `finish_reason`, and the engine's words where they say more."""
        found: dict[str, Any] = {"finish_reason": self.finish_reason}
        made = self.trajectory
        if made is not None and made.finish_reason not in ("stop", "length"):
            found["finish_detail"] = ": ".join(filter(None, (made.finish_reason, made.detail)))
        return found


class Answering:
    """The answer to one request.

    `requests`: the engine's ids of its choices; `name`: its own; `fingerprint`: of the weights.
    """

    def __init__(
        self,
        engine: Engine,
        asker: Asker,
        asked: Asked,
        requests: list[int],
        name: str,
        fingerprint: str,
    ):
        self.asker, self.asked, self.name, self.fingerprint = asker, asked, name, fingerprint
        self.created = int(time.time())
        self._engine = engine
        sampling = asked.sampling
        own = () if sampling.ignore_eos else engine.runner.model_config.eos_token_ids
        ends = frozenset((*own, *sampling.stop_token_ids))
        self.choices = [Choice(i, asked, ends, engine.tags) for i in range(len(requests))]
        self._of = dict(zip(requests, self.choices, strict=True))
        # The text of one token alone; most are asked for again and again.
        self._token_text = functools.cache(lambda token: asker.decode([token]))

    def sort(self, events: abc.Iterable[Event]) -> dict[Choice, list[Event]]:
        """The events of a visit by choice; raises ApiError where an answer has failed."""
        found: dict[Choice, list[Event]] = {}
        for event in events:
            found.setdefault(self._of[event.request], []).append(event)
            made = event.trajectory
            if made is not None and made.finish_reason == "error":
                raise ApiError(503, f"The answer failed: {made.detail}.", code="engine_error")
        return found

    def head(self, kind: str) -> dict[str, Any]:
        """What every object begins with."""
        return {
            "id": self.name,
            "object": kind,
            "created": self.created,
            "model": self.asker.name,
            "system_fingerprint": self.fingerprint,
        }

    def usage(self) -> Usage:
        """Of all choices so far."""
        prompts = sum(map(len, self.asked.prompts))
        tokens = sum(choice.tokens for choice in self.choices)
        made = [choice.trajectory for choice in self.choices if choice.trajectory is not None]
        return {
            "prompt_tokens": prompts,
            "completion_tokens": tokens,
            "total_tokens": prompts + tokens,
            "prompt_tokens_details": {"cached_tokens": sum(x.stats["cached"] for x in made)},
            "critical_path": max((x.stats["critical_path"] for x in made), default=0),
        }

    def completion_logprobs(
        self, choice: Choice, said: Said, echo: bool
    ) -> CompletionLogprobs | None:
        """Of what it says, after the prompt's tokens if they are echoed."""
        if self.asked.logprobs is None:
            return None
        found: CompletionLogprobs = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        if echo:
            self._echo(choice, found)
        offset = choice.length + (len(self.asked.texts[choice.prompt]) if self.asked.echo else 0)
        for token, length in zip(said.tokens, said.lengths, strict=True):
            self._add(found, _id(token), _logp(token), token.top, offset)
            offset += length
        return found

    def _echo(self, choice: Choice, found: CompletionLogprobs) -> None:
        """The prompt's tokens, but for one that the client did not send; the first has nothing
        before it."""
        ids, offset = self.asked.prompts[choice.prompt], 0
        first, scores = self.asked.added[choice.prompt], choice.prompt_scores
        for place in range(first, len(ids)):
            if place > first and scores is not None:  # else it was aborted before
                top = zip(
                    scores.top_ids[place].tolist(), scores.top_logp[place].tolist(), strict=True
                )
                self._add(found, ids[place], float(scores.logp[place]), top, offset)
            else:
                found["tokens"].append(self._token_text(ids[place]))
                found["token_logprobs"].append(None)
                found["top_logprobs"].append(None)
                found["text_offset"].append(offset)
            offset += len(found["tokens"][-1])

    def _add(self, found: CompletionLogprobs, token: int, logp: float, top, offset: int) -> None:
        text = self._token_text(token)
        likeliest: dict[str, float] = {}
        for i, x in top or ():  # falling: of tokens with one text the likeliest stands there
            likeliest.setdefault(self._token_text(i), _number(x))
        found["tokens"].append(text)
        found["token_logprobs"].append(_number(logp))
        found["top_logprobs"].append({text: _number(logp)} | likeliest)
        found["text_offset"].append(offset)

    def chat_logprobs(self, said: Said) -> ChatLogprobs | None:
        """Of what is said."""
        if self.asked.logprobs is None:
            return None
        found = []
        for token in said.tokens:
            likeliest = [self._chat_token(*some) for some in token.top or ()]
            found.append(self._chat_token(_id(token), _logp(token)) | {"top_logprobs": likeliest})
        return {"content": found}

    def _chat_token(self, token: int, logp: float) -> dict[str, Any]:
        text = self._token_text(token)
        whole = "\N{REPLACEMENT CHARACTER}" not in text  # else a part of a character
        raw = list(text.encode()) if whole else None
        return {"token": text, "logprob": _number(logp), "bytes": raw}

    def branch_events(self, choice: Choice, events: abc.Iterable[Event]) -> list[BranchEvent]:
        """What happened to a choice, in the order of time, tokens of a branch together; the choice
        hears of it here."""
        found: list[BranchEvent] = []
        run: list[dict[str, Any]] | None = None  # of tokens of the last event's branch
        for event in events:
            what: BranchEvent = {
                "event": "tokens",
                "branch": [list(step) for step in event.branch],
                "position": choice.order.position(event.branch),
            }
            choice.hear(event)
            if event.kind == "token":
                if run is None or found[-1]["branch"] != what["branch"]:
                    what["tokens"] = run = []
                    found.append(what)
                run.append(_token(event))
                continue
            run = None
            if event.kind == "fork":
                what["event"], what["branches"] = "fork", event.branches or 0
            elif event.kind == "join":
                what["event"], what["position"] = "join", choice.order.position(event.branch)
            elif event.kind == "finish":
                what["event"] = "finish"
                what["trace"], what["viewer"] = self._trace(choice)
            else:  # of the prompt
                continue
            found.append(what)
        return found

    def _trace(self, choice: Choice) -> tuple[dict[str, Any], dict[str, Any]]:
        """A finished choice as a line of a file of traces, and as the report's viewer opens it."""
        made = choice.trajectory
        assert made is not None
        problem = Problem(self.asker.decode(self.asked.prompts[choice.prompt]), "")
        answer = Answer(made, violations(self._engine, made), extract(made.text or ""), False)
        trace = make_trace(answer, self.asker.tokenizer, problem, id=self.name, sample=choice.index)
        trace = dataclasses.replace(trace, reference=None, correct=None)  # nobody knows
        viewer = {"row": row_of(trace, self.asker.name), "packed": pack(trace)}
        return json.loads(trace.dumps()), viewer


def _token(event: Event) -> dict[str, Any]:
    """A token with `stream_branches`."""
    logprob = _number(_logp(event))
    text = event.text or ""
    found = {"id": event.token_id, "text": text, "logprob": logprob, "forced": event.forced}
    if event.top:
        found["top"] = [[token, _number(logp)] for token, logp in event.top]
    return found


def _id(token: Event) -> int:
    assert token.token_id is not None
    return token.token_id


def _logp(token: Event) -> float:
    assert token.logp is not None
    return token.logp


def _number(logp: float) -> float:
    return logp if math.isfinite(logp) else _SMALLEST
