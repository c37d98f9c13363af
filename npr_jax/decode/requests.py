"""What is asked for becomes requests: refused with numbers, or ready to be queued."""

import math
from collections import abc
from numbers import Integral

import numpy as np

from npr_jax.decode.config import EngineConfig
from npr_jax.decode.deal import deal_answers
from npr_jax.decode.fork_join import NO_DEPTH_LIMIT
from npr_jax.decode.keys import branch_keys, seed_keys
from npr_jax.decode.sampling import SamplingParams
from npr_jax.decode.sequence import (
    Fork,
    PromptScores,
    Request,
    Segment,
    Sequence,
    figures_of,
)
from npr_jax.decode.text import StopText
from npr_jax.model.tokenizer import text_ids
from npr_jax.tree import Automaton


class RequestMaker:
    """Checks prompts and sampling, and makes requests, which it numbers."""

    def __init__(self, model, config: EngineConfig):
        self.config, self.model_config = config, model.config
        self.tokenizer, self.tags = model.tokenizer, model.tags
        self._count = 0

    def dealt(
        self,
        prompts: abc.Sequence,
        sampling: SamplingParams,
        loads: abc.Sequence[int],
        samples: abc.Sequence[range] | None = None,
    ) -> list[list[Request]]:
        """`sampling.n` requests to every prompt, or the `samples` asked for, numbered in order of
        prompts and samples: those of each replica, which has so many unfinished ones (`loads`).
        Raises the ValueErrors of `Engine.generate`."""
        if not _is_list(prompts):
            raise ValueError(
                f"prompts is {type(prompts).__name__}, needed is a list of prompts ([prompt])"
            )
        seeds = sampling.seed
        if isinstance(seeds, int):
            seeds = [seeds] * len(prompts)
        if len(seeds) != len(prompts):
            raise ValueError(f"seed has {len(seeds)} entries, needed is one, or {len(prompts)}")
        samples = [range(sampling.n)] * len(prompts) if samples is None else samples
        if len(samples) != len(prompts):
            raise ValueError(f"samples has {len(samples)} entries, needed are {len(prompts)}")
        for some in samples:
            if any(not 0 <= sample < sampling.n for sample in some):
                raise ValueError(f"samples holds {some}, needed are numbers below n={sampling.n}")
        ids = [self.check(prompt, sampling, f"prompt {i}") for i, prompt in enumerate(prompts)]
        keys = branch_keys(seed_keys(seeds), sampling.n)
        dealt = deal_answers([len(some) for some in samples], [1] * len(prompts), loads)
        parts = [
            (part.prompt, part.samples.start, part.samples.stop, replica)
            for replica, parts in enumerate(dealt)
            for part in parts
        ]
        requests: list[list[Request]] = [[] for _ in loads]
        for number, start, stop, replica in sorted(parts):
            prompt, some = ids[number], samples[number][start:stop]
            cut = len(prompt) - 1
            if len(some) == 1:  # its own pages can be found by the next turn's prompt
                cut -= cut % self.config.page_size
            shared = Segment(0, (), figures_of(sampling))
            shared.append_known(prompt[:cut], forced=False)
            shared.plain = True
            if sampling.prompt_logprobs is not None:
                shared.scores = PromptScores(prompt, sampling.prompt_logprobs)
            for sample in some:
                request = self.make(prompt, (shared,), sampling, keys[number, sample])
                requests[replica].append(request)
        return requests

    def forked(
        self, request: Request, length: int, tokens: abc.Sequence[int], sampling: SamplingParams
    ) -> Request:
        """A request that goes on behind the first `length` tokens of another's response with
        `tokens`, over the other's pages. Raises the ValueErrors of `Engine.fork`."""
        trunk = request.trunk
        for key, needed in (
            ("parallel", False),
            ("n", 1),
            ("prompt_logprobs", None),
            ("logprobs", request.sampling.logprobs),
        ):
            if getattr(sampling, key) != needed:
                raise ValueError(
                    f"{key} is {getattr(sampling, key)}, needed is {needed} for what goes on from "
                    "this answer"
                )
        if any(isinstance(item, Fork) for item in trunk.items):
            raise ValueError("this answer has branches, needed is one without to go on from")
        here = length + request.prompt_len - trunk.tail.start
        if length < 0 or here >= len(trunk.tail.tokens):
            raise ValueError(
                f"length is {length}, needed is 0 to {trunk.position - request.prompt_len} (tokens "
                "of the response, but the last)"
            )
        if not len(tokens):
            raise ValueError("tokens is empty, needed is at least one token")
        view = Segment(trunk.tail.start, trunk.tail.before, trunk.tail.dtype)
        view.append_known(trunk.tail.tokens[:here], forced=False)
        view.of = trunk.tail
        known = [token for segment in view.table for token in segment.tokens]
        prompt = self.check([*known, *tokens], sampling, "the answer with these tokens")
        (key,) = branch_keys(seed_keys(sampling.seed), 1)
        return self.make(prompt, view.table, sampling, key)

    def check(self, prompt: str | abc.Sequence[int], sampling: SamplingParams, name: str):
        """The ids of a prompt; raises the ValueError with which it would be refused."""
        if sampling.parallel and (self.tags is None or self.tags.decode is None):
            raise ValueError(
                "parallel decoding needs a tokenizer with the eight tags; this model has none "
                "(parallel=False decodes it as plain text)"
            )
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"{name} is text, but the model has no tokenizer")
            try:
                prompt = text_ids(self.tokenizer, prompt)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        ids = self.ids(prompt, name, "text or token ids")
        if not ids:
            raise ValueError(f"{name} is empty, needed is at least one token")
        vocab = self.model_config.vocab_size
        if sampling.stop and self.tokenizer is None:
            raise ValueError(f"stop is {list(sampling.stop)}, but the model has no tokenizer")
        for token in sampling.stop_token_ids:
            if token >= vocab:
                raise ValueError(f"stop_token_ids holds {token}, needed are ids below {vocab}")
        for token, _ in sampling.logit_bias:
            if token >= vocab:
                raise ValueError(f"logit_bias has the id {token}, needed are ids below {vocab}")
        if len(sampling.logit_bias) > self.config.max_logit_bias:
            raise ValueError(
                f"logit_bias has {len(sampling.logit_bias)} entries, engine.max_logit_bias is "
                f"{self.config.max_logit_bias}: raise it, or bias fewer tokens"
            )
        stops = self._stops(sampling)
        if len(stops) > self.config.max_stops:
            raise ValueError(
                f"{len(stops)} ids end or stop a sequence (stop_token_ids, ends of text, tags), "
                f"engine.max_stops is {self.config.max_stops}: raise it, or stop at fewer"
            )
        for key in ("max_branches", "max_depth"):
            asked, most = getattr(sampling, key), getattr(self.config, key)
            if asked is not None and asked > most:
                raise ValueError(f"{key} is {asked}, engine.{key} is {most}: raise it, or ask less")
        if sampling.parallel and sampling.min_tokens and self.config.rules.positions == "sum":
            raise ValueError(
                f"min_tokens is {sampling.min_tokens} and engine.rules.positions 'sum', under "
                "which positions are not the tokens of a path: set min_tokens to 0, or positions "
                "to 'max'"
            )
        if sampling.parallel and sampling.stop and self.config.rules.trial is not None:
            raise ValueError(
                f"stop is {list(sampling.stop)} and engine.rules.trial "
                f"{self.config.rules.trial!r}: set stop to [], or rules.trial to null"
            )
        least = sampling.prompt_logprobs is not None  # the program that scores is there from 1 on
        for key, asked in (
            ("logprobs", sampling.logprobs),
            ("prompt_logprobs", max(sampling.prompt_logprobs or 0, least)),
        ):
            if asked > self.config.max_logprobs:
                raise ValueError(
                    f"{key} is {getattr(sampling, key)}, engine.max_logprobs is "
                    f"{self.config.max_logprobs}, needed is at least {asked}: raise it"
                )
        self.refuse_too_long(len(ids), sampling, name)
        return ids

    def ids(self, given, name: str, needed: str = "token ids") -> list[int]:
        """Given ids as Python's; raises ValueError unless all are of the vocabulary."""
        if not _is_list(given):
            raise ValueError(f"{name} is {type(given).__name__}, needed is {needed}")
        vocab = self.model_config.vocab_size
        for place, token in enumerate(given):
            if not ((type(token) is int and 0 <= token < vocab) or _is_id(token, vocab)):
                raise ValueError(
                    f"{name} holds {token!r} at {place}, needed are token ids from 0 to "
                    f"{vocab - 1} (outside the vocabulary of {vocab})"
                )
        return [int(token) for token in given]

    def refuse_too_long(self, prompt_len: int, sampling: SamplingParams, name: str) -> None:
        """Refuses what could never fit an empty pool without any branch."""
        size = self.config.page_size
        limit = self._max_position(sampling)
        if prompt_len >= limit:
            raise ValueError(
                f"{name} has {prompt_len} tokens, but max_position is {limit}: shorten it or raise "
                "max_position"
            )
        tokens = min(prompt_len + sampling.max_tokens, limit)
        need = math.ceil((prompt_len - 1) / size) + math.ceil((tokens - prompt_len + 1) / size)
        have = self.config.longest_table
        if need > have:
            raise ValueError(
                f"{name} needs {need} pages of {size} for {prompt_len} prompt tokens and "
                f"max_tokens={sampling.max_tokens}; a line can have {have} (EngineConfig pages, "
                "table_pages)"
            )

    def make(
        self, prompt: list[int], before: tuple[Segment, ...], sampling: SamplingParams, key
    ) -> Request:
        """A request: its prompt begins with the tokens of the segments `before`, which other
        requests may list too; the trunk's own segment starts with the rest, from whose last token
        its first is drawn."""
        request = Request(self._count, sampling, len(prompt), self._max_position(sampling))
        self._count += 1
        request.ends = frozenset(self._ends(sampling))
        request.stops = self._stops(sampling)
        trunk = request.trunk = Sequence(request, None, 0, key)
        last = before[-1]
        cut = last.offset + len(last.tokens)
        own = Segment(cut, before if cut else (), last.dtype)
        own.append_known(prompt[cut:], forced=False)
        request.scores = own.scores = last.scores
        own.plain = last.plain and cut % self.config.page_size == 0
        trunk.items += before
        trunk.append(own)
        trunk.budget = sampling.max_tokens
        if sampling.stop:
            trunk.stop = StopText(self.tokenizer, sampling.stop)
        if sampling.parallel and self.tags is not None:
            trunk.automaton = Automaton(self.tags, NO_DEPTH_LIMIT, index=len(prompt))
        return request

    def _ends(self, sampling: SamplingParams) -> tuple[int, ...]:
        """Ids that end the text."""
        own = () if sampling.ignore_eos else self.model_config.eos_token_ids
        return *own, *sampling.stop_token_ids

    def _stops(self, sampling: SamplingParams) -> tuple[int, ...]:
        """Ids at which a lane freezes: ends of the text, and the two tags that may be events."""
        eos = self._ends(sampling)
        if sampling.parallel and self.tags is not None:
            eos += self.tags.guideline_close, self.tags.step_close
        return tuple(dict.fromkeys(eos))

    def _max_position(self, sampling: SamplingParams) -> int:
        limit = self.model_config.max_position_embeddings
        return limit if sampling.max_position is None else min(limit, sampling.max_position)


def _is_list(given) -> bool:
    if isinstance(given, np.ndarray):
        return given.ndim > 0
    return isinstance(given, abc.Sequence) and not isinstance(given, str | bytes)


def _is_id(token, vocab: int) -> bool:
    return isinstance(token, Integral) and not isinstance(token, bool) and 0 <= int(token) < vocab
