"""Parallel structure that was there all along: right sequential answers get branches.

    answer --parts--> lines, items, paragraphs --losses--> independent runs --framed--> Trace

After ASPD (arXiv 2508.08895, section 3.1), with one difference. There a larger model rewrites an
answer, and judges which branches are independent. Here nothing is rewritten, and independence is
measured by the model that reads the answer: a part is independent of those before it in its run if
it loses hardly any log-prob where these are hidden. The answer's tokens stay as they are.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, TypedDict

import numpy as np

from npr_jax.base.compile_cache import DEFAULT_CACHE, use_cache
from npr_jax.base.fields import Checked, Count, Dtype, PositiveOrZero
from npr_jax.base.files import cut_half_line, writing
from npr_jax.base.progress import Progress
from npr_jax.decode.text import TextPieces
from npr_jax.evaluate.generate import adding, write_all
from npr_jax.evaluate.likelihood import Likelihood
from npr_jax.evaluate.traces import Trace, of_tokenizer, read_trace, read_traces
from npr_jax.model.pretrained import Model, load
from npr_jax.tree import Block, TagIds, TraceError, TreeLayout, layout, parse
from npr_jax.tree.format import check_format


@dataclasses.dataclass(frozen=True)
class MineConfig(Checked):
    """How structure is looked for.

    Attributes:
      tau (nats): a part is independent if its tokens lose at most this log-prob on average when the
        parts before it in its run are hidden.
      min_tokens (tokens): of a part, behind its title; shorter ones stay in the trunk.
      title_tokens (tokens): of a plan at most, which is the beginning of its part.
      max_branches: longer runs become so many branches of about one length.
      max_tokens (tokens): prompt and answer; longer ones stay as they are.
      rows: that are scored together.
      dtype: of the weights.
      compilation_cache: where compiled programs are kept for the next run; null keeps none.
    """

    command: ClassVar[str] = "mine"

    tau: PositiveOrZero = 0.1
    min_tokens: Count = 4
    title_tokens: Count = 8
    max_branches: Count = 5
    max_tokens: Count = 8192
    rows: Count = 8
    dtype: Dtype = "float32"
    compilation_cache: str | None = str(DEFAULT_CACHE)


class Part(NamedTuple):
    """Tokens [start, end) of an answer; those from `title` to `body` are its title."""

    start: int
    title: int
    body: int
    end: int


Run = tuple[Part, ...]  # parts that follow each other, each independent of those before it


class Structure(NamedTuple):
    """The runs of an answer, in order, and the part behind each, which is its takeaway."""

    runs: tuple[Run, ...] = ()
    takeaways: tuple[Part, ...] = ()

    def worth(self, tokens: int) -> tuple[float, float, float]:
        """ASPD's order of candidates, of an answer of so many tokens: the share of them in
        branches (DP), branches a block (ABN), and what is no title in branches (PE); 0 if none."""
        parts = list(itertools.chain(*self.runs))
        inside = sum(part.end - part.start for part in parts)
        if not inside:
            return 0.0, 0.0, 0.0
        titles = sum(part.body - part.title for part in parts)
        return inside / tokens, len(parts) / len(self.runs), 1 - titles / inside


_BEGINNING = b'{"problem":'  # of every line that is written here
_MARKER = r"[ \t]*(?:[-*+\u2022]|\(?\d{1,3}[.):]|\(?[A-Za-z][.)])[ \t]+"
_LINES = re.compile(r"[^\n]*\n\s*|[^\n]+$")
_ITEMS = re.compile(rf"(?:{_MARKER}[^\n]*\n(?:(?!{_MARKER})[^\n]*\S[^\n]*\n)*|[^\n]*\n)\s*|[^\n]+$")
_PARAGRAPHS = re.compile(r"(?:[^\n]*\S[^\n]*\n)+\s*|[^\n]*\n\s*|[^\n]+$")
_TITLE_ENDS = re.compile(r"[:=.,;\n]")


def parts(trace: Trace, pattern: re.Pattern, config: MineConfig) -> list[Part]:
    """The parts of an answer's text, which `pattern` matches one after the other; without gaps.

    A part that would end inside a token ends with the next one that does not.
    """
    text, first = trace.text, trace.prompt_len
    ends = np.cumsum([len(piece) for piece in trace.pieces[first:]])
    found, start = [], 0
    for match in pattern.finditer(text):
        place = int(np.searchsorted(ends, match.end()))
        if place == len(ends) or ends[place] != match.end():
            continue
        end = len(ends) if match.end() == len(text) else place + 1
        found.append(_part(trace, first + start, first + end, config))
        start = end
    return found


def _part(trace: Trace, start: int, end: int, config: MineConfig) -> Part:
    """With the title: what stands behind a list's marker, up to the first sign of punctuation."""
    pieces = trace.pieces[start:end]
    marker = re.match(_MARKER, "".join(pieces))
    lengths = list(itertools.accumulate(map(len, pieces)))
    skipped = sum(length <= marker.end() for length in lengths) if marker else 0
    title = start + (skipped if skipped < len(pieces) else 0)
    body = title + 1
    while body < min(end, title + config.title_tokens):
        if _TITLE_ENDS.search(trace.pieces[body]):
            break
        body += 1
    return Part(start, title, body, end)


def find(
    num_tokens: int, found: Sequence[Part], config: MineConfig, same: Callable[[Run], bool]
) -> Generator[TreeLayout, np.ndarray, Structure]:
    """The runs among the parts of an answer, the longest from the left on.

    Yields layouts of the answer's tokens, is sent their log-probs f32[T] under each, and returns
    the structure. `same(run)`: whether two plans of the run would say the same.
    """
    structure, start = Structure(), 0
    base = yield layout(num_tokens)
    while start < len(found) - 3:  # two branches, a takeaway, and what follows it
        apart = found[start:-1]
        logp = yield layout(num_tokens, [_beside(apart, num_tokens)])
        good = [
            part.end - part.body >= config.min_tokens
            and float(np.mean((base - logp)[part.body : part.end])) <= config.tau
            for part in apart
        ]
        end = start + (good.index(False) if False in good else len(good))
        run = tuple(found[start : min(end, len(found) - 2)])
        while len(run) > 1 and same(run):
            run = run[:-1]
        if len(run) < 2:
            start += 1
            continue
        behind = start + len(run)
        structure = Structure(
            (*structure.runs, _merged(run, config.max_branches)),
            (*structure.takeaways, found[behind]),
        )
        start = behind + 1
    return structure


def _beside(apart: Sequence[Part], num_tokens: int) -> Block:
    """Parts beside each other, each behind all that stands before the first; they never join."""
    steps = tuple((part.start, part.end) for part in apart)
    first, last = apart[0].start, apart[-1].end
    return Block(first, first - 1, (), steps, last, None, num_tokens, 0)


def _merged(run: Run, most: int) -> Run:
    """At most so many branches: neighbours are joined, the two first that are shortest together."""
    run_ = list(run)
    while len(run_) > most:
        sizes = [b.end - a.start for a, b in itertools.pairwise(run_)]
        i = sizes.index(min(sizes))
        run_[i : i + 2] = [run_[i]._replace(end=run_[i + 1].end)]
    return tuple(run_)


class Framing:
    """The tokens around branches, made once for a tokenizer with tags."""

    def __init__(self, tokenizer, tags: TagIds):
        def behind(tag: str, text: str) -> list[int]:
            return tokenizer.encode(tag + text, add_special_tokens=False)[1:]

        self.tags = tags
        self._line = behind("<guideline>", "\n"), behind("</plan>", "\n")
        self._number = functools.cache(lambda number: behind("<plan>", f"{number}:"))

    def framed(self, trace: Trace, structure: Structure) -> list[int]:
        """The ids of a trace with its runs as branches, in which every token of the answer is
        where it was; a title stands in its plan too."""
        ids, tags, done = trace.token_ids, self.tags, 0
        made: list[int] = []
        for run, takeaway in zip(structure.runs, structure.takeaways, strict=True):
            made += [*ids[done : run[0].start], tags.guideline_open, *self._line[0]]
            for number, part in enumerate(run, 1):
                made += [tags.plan_open, *self._number(number), *ids[part.title : part.body]]
                made += [tags.plan_close, *self._line[1]]
            made.append(tags.guideline_close)
            for header, part in zip(tags.step_headers, run, strict=False):
                made += [*header, *ids[part.start : part.end], tags.step_close]
            made += [*tags.takeaway_header, *ids[takeaway.start : takeaway.end]]
            made.append(tags.takeaway_close)
            done = takeaway.end
        return made + ids[done:]

    def joined(self, ids: Sequence[int], prompt_len: int) -> list[int]:
        """The ids of the answer that was framed so: all but what `framed` has added."""
        ids, tags, done = list(ids), self.tags, 0
        made: list[int] = []
        for block in parse(ids, prompt_len, tags).blocks:
            assert block.takeaway is not None  # complete blocks only
            made += ids[done : block.start]
            for header, (start, end) in zip(tags.step_headers, block.branches, strict=False):
                made += ids[start + len(header) : end - 1]
            made += ids[block.join + len(tags.takeaway_header) : block.takeaway[1] - 1]
            done = block.takeaway[1]
        return made + ids[done:]


class Miner:
    """Finds structure in answers by a model whose tokenizer has the tags."""

    def __init__(self, model: Model, config: MineConfig):
        assert model.tags is not None
        self.model, self.config = model, config
        self.framing = Framing(model.tokenizer, model.tags)
        self.score = Likelihood(model, config.rows)

    def mine(self, traces: Sequence[Trace]) -> list[tuple[Trace, Structure]]:
        """Of each the trace with its branches, and what these are; the trace itself where none are
        found."""
        searches = [
            (i, find(len(trace.token_ids), some, self.config, functools.partial(_same, trace)))
            for i, trace in enumerate(traces)
            if len(trace.token_ids) <= self.config.max_tokens
            for pattern in (_LINES, _ITEMS, _PARAGRAPHS)
            if len(some := parts(trace, pattern, self.config)) > 3
        ]
        best = [Structure()] * len(traces)
        for i, structure in self._run(traces, searches):
            tokens = len(traces[i].token_ids) - traces[i].prompt_len
            best[i] = max(best[i], structure, key=lambda some: some.worth(tokens))
        return [self._made(*some) for some in zip(traces, best, strict=True)]

    def _run(self, traces: Sequence[Trace], searches) -> Iterator[tuple[int, Structure]]:
        """Runs searches (trace, generator) side by side: what they ask for is scored together."""
        asked = [(i, search, next(search)) for i, search in searches]
        while asked:
            logps = self.score([(traces[i].token_ids, tree) for i, _, tree in asked])
            todo, asked = zip(asked, logps, strict=True), []
            for (i, search, _), logp in todo:
                try:
                    asked.append((i, search, search.send(logp)))
                except StopIteration as end:
                    yield i, end.value

    def _made(self, trace: Trace, structure: Structure) -> tuple[Trace, Structure]:
        if not structure.runs:
            return trace, structure
        tags = self.framing.tags
        ids = self.framing.framed(trace, structure)
        try:
            tree = parse(ids, trace.prompt_len, tags)
        except TraceError:  # tags in its text
            return trace, Structure()
        text = TextPieces(self.model.tokenizer)
        pieces = [text.add(token) for token in ids]
        pieces[-1] += text.flush()
        broken = check_format(ids, trace.prompt_len, tags, self.config.max_branches)
        made = dataclasses.replace(
            trace,
            token_ids=ids,
            pieces=pieces,
            logp=[0.0] * len(ids),
            step=[-1] * len(ids),
            forced=tree.forced.tolist(),
            blocks=tree.blocks,
            violations=[violation.reason for violation in broken],
        )
        return made, structure


def _same(trace: Trace, run: Run) -> bool:
    """Whether a plan of the run would say nothing, or what another says."""
    titles = ["".join(trace.pieces[part.title : part.body]).strip() for part in run]
    return len({*titles}) < len(run) or not all(titles)


class Found(TypedDict):
    """What was found in a file of answers.

    answers, right, with_branches: how many there are, of these are right, and of these have
    branches. parallel_tokens: the share of the right answers' tokens that stand in branches.
    critical_path: tokens on the longest paths, with those of tags and plans, by the right answers'
    tokens. branches: of a block, on average.
    """

    answers: int
    right: int
    with_branches: int
    parallel_tokens: float
    critical_path: float
    branches: float


def mine(
    model: str,
    source: Path,
    target: Path,
    config: MineConfig,
    tell: Callable[[str], None] = lambda line: None,
) -> Found:
    """Mines the right answers of `source`, a file of traces, into `target`: one trace for each, in
    their order, with branches where there are any. What `target` has is not mined again.

    Raises ValueError for files of another kind or other answers, and where the model has no
    tokenizer or another one; OSError where a file cannot be read or written.
    """
    answers = list(read_traces(source))
    right = [trace for trace in answers if trace.correct]
    if not right:
        raise ValueError(
            f"{source} has {len(answers)} answers and none that is right: needed are traces of an "
            "evaluation whose problems have references"
        )
    if any(trace.blocks for trace in right):
        raise ValueError(
            f"{source} has answers with branches: needed are sequential ones "
            "(--set sampling.parallel=false)"
        )
    with adding(target) as file:
        done = _read_done(target, right, source)
        todo = right[len(done) :]
        if todo:
            if config.compilation_cache:
                use_cache(config.compilation_cache)
            miner, size = Miner(_load(model, todo, config), config), 4 * config.rows
            with Progress("mine", len(right), "answer", len(done)) as progress:
                for begin in range(0, len(todo), size):
                    mined = [made for made, _ in miner.mine(todo[begin : begin + size])]
                    with writing(target, "make room there, and run the same command again"):
                        write_all(file, "".join(made.dumps() + "\n" for made in mined).encode())
                    done += mined
                    share = sum(bool(made.blocks) for made in done) / len(done)
                    progress.advance(len(mined), {"with branches": share})
    return _summed(len(answers), right, done)


def _read_done(target: Path, right: list[Trace], source: Path) -> list[Trace]:
    """The traces that `target` has; a last line that was not written whole is cut off, once the
    others are seen to be of these answers."""
    done = []
    *lines, half = target.read_bytes().split(b"\n")
    if half[: len(_BEGINNING)] != _BEGINNING[: len(half)]:
        raise ValueError(f"{target} is no file of traces: give another --output")
    for number, line in enumerate(lines, 1):
        try:
            done.append(read_trace(line))
        except ValueError as error:
            raise ValueError(f"{target}:{number}: {error}; give another --output") from error
        if number > len(right) or _name(done[-1]) != _name(right[number - 1]):
            raise ValueError(
                f"{target}:{number} is of another answer than the right one {number} of {source}: "
                "give another --output"
            )
    cut_half_line(target)
    return done


def _name(trace: Trace) -> tuple:
    """What a trace keeps when it is mined, and no other has."""
    return trace.benchmark, trace.id, trace.sample, trace.problem, trace.prompt_len


def _load(name: str, traces: Sequence[Trace], config: MineConfig) -> Model:
    """The model, with tags; ValueError where its tokenizer is not that of the traces."""
    model = load(name, dtype=config.dtype)
    if model.tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, needed is that of the answers")
    if not of_tokenizer(traces[0], model.tokenizer):
        raise ValueError(f"{name} has another tokenizer than the model of the answers (--model)")
    return model.with_tags()


def _summed(answers: int, right: list[Trace], mined: list[Trace]) -> Found:
    tokens = sum(len(trace.token_ids) - trace.prompt_len for trace in right)
    blocks = [block for trace in mined for block in trace.blocks]
    inside = 0
    for trace in mined:
        forced = np.array(trace.forced, bool)
        for block in trace.blocks:  # of a step all but header and end
            inside += sum(
                end - 1 - start - forced[start:end].sum() for start, end in block.branches
            )
    return Found(
        answers=answers,
        right=len(right),
        with_branches=sum(bool(trace.blocks) for trace in mined),
        parallel_tokens=float(inside / tokens),
        critical_path=sum(trace.layout.critical_path_len for trace in mined) / tokens,
        branches=sum(len(block.steps) for block in blocks) / max(1, len(blocks)),
    )


def report_lines(found: Found, target: Path) -> list[str]:
    """The same in words."""
    return [
        f"{found['answers']} answers, {found['right']} right: {target}",
        f"with branches: {found['with_branches']} ({found['branches']:.1f} branches a block)",
        f"tokens that can run in parallel: {found['parallel_tokens']:.1%}",
        f"longest path, with tags and plans: {found['critical_path']:.1%} of the tokens",
    ]
