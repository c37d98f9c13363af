"""What the engine gives out: events while an answer is decoded, and the finished answer.

A finished answer is a `Trajectory`: its tokens with their tree, log-probs and figures.
"""

import dataclasses
from collections import abc, deque

import numpy as np

from npr_jax.decode.sequence import Fork, PromptScores, Request, Segment, Sequence
from npr_jax.decode.text import StopText
from npr_jax.tree import Block, Rules, TreeLayout, layout

KINDS = ("prompt", "token", "fork", "join", "finish")
FINISH_REASONS = (
    "stop",
    "length",
    "branch_eos",
    "branch_length",
    "malformed",
    "invalid_block",
    "pages_exhausted",
    "aborted",
    "error",
)
NOT_FINITE = (
    "the model's log-probabilities are not finite: its weights are, or what it computed of them"
)
TRUNCATED = ("length", "branch_length", "pages_exhausted")  # of these, cut off by a limit


@dataclasses.dataclass(frozen=True, eq=False)
class Trajectory:
    """One answer, flat in depth-first order: T tokens, prompt and response.

    Attributes:
      token_ids: i32[T].
      prompt_len: number of prompt tokens.
      layout: what was really forked; a block decoded sequentially is plain text in it.
      logp: f32[T], raw log-prob (temperature 1, no penalty, no filter) of every sampled token; 0
        for forced tokens and the prompt, unless `sampling.prompt_logprobs` asks for the latter's
        (0 for its first token, and where the answer ended before it had begun).
      logp_sampled: f32[T], the same under the distribution that was sampled from.
      margin: f32[T], by how much the token won (the perturbed logits, best minus second).
      step: i32[T], the engine's decode step (`Engine.stats`) that drew the token; -1 for the prompt
        and for forced tokens.
      forced: bool[T], tokens of the response that the engine wrote.
      text: of the response; None without a tokenizer.
      finish_reason: one of FINISH_REASONS; `detail` says more.
      stats: figures: tokens, critical_path, branches, width, depth, sampled, preempted (times),
        cached (tokens of the prompt that were not computed for it), and refused_blocks: why each
        block that was refused went on sequentially.
      top_ids: i32[T, k], the likeliest tokens in place of each, falling, equal ones by rising id;
        -1 for forced tokens, the prompt without `sampling.prompt_logprobs`, and where that or
        `sampling.logprobs` is less than the other, whose k it is. None where both ask for none.
      top_logp: f32[T, k], their raw log-probs, with the bits that `logp` has; 0 where none is.
    """

    token_ids: np.ndarray
    prompt_len: int
    layout: TreeLayout
    logp: np.ndarray
    logp_sampled: np.ndarray
    margin: np.ndarray
    step: np.ndarray
    forced: np.ndarray
    text: str | None
    finish_reason: str
    detail: str
    stats: dict
    top_ids: np.ndarray | None = None
    top_logp: np.ndarray | None = None

    @property
    def response_ids(self) -> np.ndarray:
        """Token ids of the response, i32[T - prompt_len]."""
        return self.token_ids[self.prompt_len :]


@dataclasses.dataclass(frozen=True)
class Event:
    """One thing that happened to one answer.

    Attributes:
      kind: "prompt" (its log-probs, where `sampling.prompt_logprobs` asks for them: once, before
        the first token), "token" (of the response, sampled or forced), "fork" (a block's branches
        start), "join" (its trunk goes on), or "finish".
      request: the id that `Engine.submit` returned for the answer.
      branch: where it happened: (block, branch) on the way from the trunk, counted from 0; () is
        the trunk. Tokens of one sequence come in order; sequences are interleaved.
      token_id, logp, forced: of a token; logp is raw, 0 for a forced token.
      top: of a token, (id, raw log-prob) of the likeliest in its place, the likeliest first; None
        for a forced token, and where `sampling.logprobs` is 0.
      text: what the token adds to its sequence's text: "" while a character is incomplete (what is
        left of one comes with the sequence's last token, or, of a trunk that was cut off later,
        with the finish); None without a tokenizer.
      branches: of a fork, their number.
      trajectory: of a finish, the answer.
      prompt: of a prompt, its `token_ids`, `logp`, `top_ids` and `top_logp`.
    """

    kind: str
    request: int
    branch: tuple[tuple[int, int], ...] = ()
    token_id: int | None = None
    logp: float | None = None
    forced: bool = False
    text: str | None = None
    branches: int | None = None
    trajectory: Trajectory | None = None
    top: tuple[tuple[int, float], ...] | None = None
    prompt: PromptScores | None = None


class Outputs:
    """What has happened; told in one place, to callbacks and to whoever takes the events out.

    `end(request, reason, detail)` ends an answer whose callback or tokenizer raises; `requests`, by
    id, are left by those whose finish is told; `rules`: by which answers are laid out.

    Attributes:
      events: for a stream; `tokens`: whether it wants those of tokens.
      finished: the last events of quiet requests, whose consumer waits for nothing else.
    """

    def __init__(self, tokenizer, rules: Rules, end: abc.Callable, requests: dict[int, Request]):
        self.events: deque[Event] = deque()
        self.finished: deque[Event] = deque()
        self.tokens = False
        self._tokenizer, self._rules = tokenizer, rules
        self._end, self._requests = end, requests
        self._untold: deque[tuple] = deque()
        self._delivering = False

    def note(self, sequence: Sequence, kind: str, tokens=(), figures=None, branches=None) -> None:
        """Something happened: `tokens` were sampled with these figures, or forced without."""
        if kind == "token":
            request = sequence.request
            if not request.on_event and (request.quiet or not self.tokens):
                return  # nobody listens
            sequence.untold += 1
        begin = sequence.position + 1 - len(tokens)  # where these stand
        self._untold.append((sequence, kind, begin, tokens, figures, branches))

    def deliver(self) -> None:
        """Tells what has happened. Callbacks run here, so no lane or page is being changed; what
        they cause (an abort, their own failure) is told after what had happened before. What is
        raised to the caller is raised when everything is told, so that nothing is left of it."""
        if self._delivering:
            return
        self._delivering, raised = True, None
        try:
            while self._untold:
                sequence, kind, *what = self._untold.popleft()
                try:
                    if kind == "finish":
                        self._finish(sequence.request)
                    elif not sequence.request.silent:
                        self._tell_all(sequence, kind, *what)
                except BaseException as error:  # the caller's or the tokenizer's
                    self._fail(sequence.request, error)
                    if kind == "finish" or not isinstance(error, Exception):
                        raised = raised or error
        finally:
            self._delivering = False
        if raised:
            raise raised

    def _tell_all(self, sequence: Sequence, kind: str, begin, tokens, figures, branches) -> None:
        request = sequence.request
        if kind != "token":
            scores = request.scores if kind == "prompt" else None
            event = Event(kind, request.id, sequence.branch, branches=branches, prompt=scores)
            self._tell(request, event)
            return
        sequence.untold -= 1
        logp = None if figures is None else figures["logp"].tolist()
        top = None if figures is None else _tops(figures, request.sampling.logprobs)
        over = not sequence.untold and (sequence.done or request.end is not None)
        forks = not sequence.untold and sequence.waiting
        for i, token in enumerate(tokens):
            if request.silent:
                return
            early = begin + i < request.ends_from
            known = early or logp is None or token in request.ends
            text = self._text(sequence, token, known)
            if text is not None and i + 1 == len(tokens):
                text += sequence.text.flush() if over else sequence.text.settle() if forks else ""
            event = Event(
                kind,
                request.id,
                sequence.branch,
                token_id=token,
                logp=0.0 if logp is None else logp[i],
                forced=logp is None,
                text=text,
                top=top[i] if top else None,
            )
            self._tell(request, event)

    def _text(self, sequence: Sequence, token: int, known: bool) -> str | None:
        if self._tokenizer is None:
            return None
        if sequence.text is None:
            sequence.text = StopText(self._tokenizer, sequence.request.sampling.stop)
        return sequence.text.add(token, known)

    def _tell(self, request: Request, event: Event) -> None:
        if not request.quiet and (self.tokens or event.kind != "token"):
            self.events.append(event)
        if request.on_event:
            request.on_event(event)

    def _fail(self, request: Request, error: BaseException) -> None:
        """The answer ends. What is no Exception (Ctrl-C, SystemExit) ends all others too, as in a
        visit, and the callback that it came from is not called for them either."""
        callback = request.on_event
        request.silent, request.on_event = True, None
        self._end(request, "error", f"{type(error).__name__}: {error}")
        if not isinstance(error, Exception):
            for other in self._requests.values():
                if other.on_event == callback:
                    other.on_event = None
            self.end_all(error)

    def end_all(self, error: BaseException) -> None:
        """Whatever is unfinished ends with this error, which the next delivery tells."""
        for request in self._requests.values():
            if request.end is None:
                self._end(request, "error", f"{type(error).__name__}: {error}")

    def _finish(self, request: Request) -> None:
        del self._requests[request.id]
        assert request.end is not None
        answer = make_trajectory(request, *request.end, self._tokenizer, self._rules)
        pieces, text = request.trunk.text, None
        if pieces and answer.finish_reason != "error":
            try:
                text = pieces.flush() or None
            except Exception as error:  # the tokenizer's: only this answer fails
                failed = f"{type(error).__name__}: {error}"
                answer = dataclasses.replace(answer, finish_reason="error", detail=failed)
        event = Event("finish", request.id, text=text, trajectory=answer)
        try:
            if request.on_event:
                request.on_event(event)
        except BaseException as error:
            failed = f"{type(error).__name__}: {error}"
            answer = dataclasses.replace(answer, finish_reason="error", detail=failed)
            event = dataclasses.replace(event, trajectory=answer)
            if not isinstance(error, Exception):
                raise
        finally:
            (self.finished if request.quiet else self.events).append(event)


def _tops(figures: np.ndarray, count: int) -> list[tuple[tuple[int, float], ...]] | None:
    """(id, log-prob) of the `count` likeliest tokens in place of each; None where it is 0."""
    if not count:
        return None
    both = (figures[name][:, :count].tolist() for name in ("top_ids", "top_logp"))
    both = zip(*both, strict=True)
    return [tuple(zip(ids, logps, strict=True)) for ids, logps in both]


def make_trajectory(
    request: Request, reason: str, detail: str, tokenizer, rules: Rules
) -> Trajectory:
    """The answer as far as it has come; a tokenizer that fails makes its reason `error`."""
    segments, blocks = _flatten(request.trunk)

    ids = [token for s in segments for token in s.tokens]
    tokens = np.array(ids, np.int32)
    figures = np.frombuffer(b"".join(s.figures for s in segments), segments[0].dtype)
    columns = {name: figures[name].copy() for name in figures.dtype.names or ()}
    forced = columns["forced"]
    if (scores := request.scores) is not None:
        columns["logp"][: request.prompt_len] = scores.logp
        if top := scores.top_ids.shape[1]:
            columns["top_ids"][: request.prompt_len, :top] = scores.top_ids
            columns["top_logp"][: request.prompt_len, :top] = scores.top_logp
    tree = request.tree
    if tree is None or len(tree) != len(tokens):
        tree = layout(len(tokens), blocks, request.prompt_len, forced, rules, tokens)
    positions = np.concatenate([s.start + np.arange(len(s.tokens)) for s in segments])
    assert (positions == tree.positions).all(), "the engine left the layout's positions"
    response = ids[request.prompt_len :]
    if response and response[-1] in request.ends:
        response = response[:-1]
    text = None
    if tokenizer is not None:
        try:
            text = tokenizer.decode(response, clean_up_tokenization_spaces=False)
            if reason == "stop" and request.trunk.stop is not None:
                text = text[: len(text) - request.trunk.stop.dropped]
        except Exception as error:  # only this answer fails
            reason, detail = "error", f"{type(error).__name__}: {error}"
    return Trajectory(
        token_ids=tokens,
        prompt_len=request.prompt_len,
        layout=tree,
        text=text,
        finish_reason=reason,
        detail=detail,
        stats={
            "tokens": tree.total_len,
            "critical_path": tree.critical_path_len,
            "branches": tree.num_branches,
            "width": tree.width,
            "depth": tree.depth,
            "sampled": int((~forced[request.prompt_len :]).sum()),
            "preempted": request.preempted,
            "cached": request.cached,
            "refused_blocks": list(request.refused),
        },
        **columns,
    )


def _flatten(trunk: Sequence) -> tuple[list[Segment], list[Block]]:
    """The segments of an answer in depth-first order, and the spans of its forked blocks."""
    segments: list[Segment] = []
    found: list[tuple] = []
    total = 0

    def walk(sequence: Sequence, depth: int) -> None:
        nonlocal total
        own = 0  # tokens of this sequence so far
        for item in sequence.items:
            if isinstance(item, Segment):
                segments.append(item)
                total += len(item.tokens)
                own += len(item.tokens)
                continue
            before, slot, steps = total - own, len(found), []
            found.append(())
            for branch, opens in zip(item.branches, item.opens, strict=True):
                start = total
                walk(branch, depth + 1)
                steps.append((start + opens, total))
            found[slot] = (item, depth, before, tuple(steps), total, total - own)

    def block(item: Fork, depth, before, steps, join, after) -> Block:
        """`before` and `after`: what to add to the sequence's own token counts around the fork."""
        b, takeaway = item.block, None
        assert b.guideline_close is not None
        if item.joined:
            assert b.takeaway is not None
            end = b.takeaway[1]  # None where it is open; of a replay it may lie ahead
            takeaway = (b.takeaway[0] + after, total if end is None else min(end + after, total))
        return Block(
            start=b.start + before,
            guideline_close=b.guideline_close + before,
            plans=tuple((start + before, end + before) for start, end in b.plans),
            steps=steps,
            join=join if item.joined else total,
            takeaway=takeaway,
            end=takeaway[1] if takeaway else total,
            depth=depth,
        )

    walk(trunk, 0)
    return segments, [block(*parts) for parts in found]
