"""Stage 2, Beta: rejection sampling from Zero, then supervised training of the seed model.

arXiv 2512.07461 eq. 3 and 4, algorithms 1 and 2. An answer of the Zero model is accepted if it
keeps the format and is correct. Accepted answers get canonical framing, are laid out as trees, and
the seed model learns them: from here on it thinks in parallel.

Cold start: without a Zero model the answers are those of the file of problems, which a script wrote
or `npr-jax mine`.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import yaml
from jax.sharding import Mesh

from npr_jax.answers.check import find_check
from npr_jax.base.config import dump_config
from npr_jax.base.distributed import gather, gather_all, is_main
from npr_jax.base.fields import Checked, Count, CountOrZero, PositiveOrZero, Range, Seed
from npr_jax.base.files import write_atomically, writing
from npr_jax.base.mesh import MeshConfig, local_decode_mesh, make_mesh
from npr_jax.base.progress import Scalar
from npr_jax.data.problems import read_problems, shuffled
from npr_jax.data.sources import Problem
from npr_jax.decode import Engine, EngineConfig, SamplingParams
from npr_jax.evaluate.judge import Answer
from npr_jax.evaluate.steps import find_labels
from npr_jax.evaluate.verdicts import word_ids
from npr_jax.model.pretrained import Model, load, load_tokenizer, publish_model
from npr_jax.runs import loop, sigterm
from npr_jax.runs.checkpoint import checkpoint_steps
from npr_jax.runs.directory import SIZES, claim, claim_inputs, read_config
from npr_jax.runs.log import Report
from npr_jax.runs.loop import Body
from npr_jax.train.export import checkpoints_of
from npr_jax.train.fit import Fit, FitConfig
from npr_jax.train.given import read_given
from npr_jax.train.inputs import model_content, problems_content
from npr_jax.train.objective import Objective
from npr_jax.train.packing import Example, loss_mask
from npr_jax.train.records import ACCEPTED, Record, Records
from npr_jax.train.rollout import BETA, encode_problems, engine_params, roll_out
from npr_jax.train.start import Start, find_start, parse_start
from npr_jax.train.step import TrainConfig
from npr_jax.train.verdicts import judged
from npr_jax.tree import Rules, TagIds, TraceError, layout, parse
from npr_jax.tree.canonical import canonical
from npr_jax.tree.parse import reference_depth
from npr_jax.tree.rules import PAPER

MAX_DEPTH = 1  # what the format check accepts


@dataclasses.dataclass(frozen=True)
class SampleConfig(Checked):
    """Rejection sampling. Of answers that are given, `num_problems` and the two limits say which.

    Attributes:
      max_tokens (tokens): the most that an answer may have.
      num_problems (problems): how many are tried; 0 is all.
      batch (problems): that are sampled together; the unit of resumption.
      tries (answers): to a problem at most.
      keep (answers): accepted ones after which a problem is done.
      temperature: of sampling; 0 is greedy.
      top_p: the smallest set of tokens with this much probability is sampled from; 1 is all.
      max_prompt_tokens (tokens): problems with longer prompts are left out.
    """

    max_tokens: Count
    num_problems: CountOrZero = 0
    batch: Count = 256
    tries: Count = 8
    keep: Count = 1
    temperature: PositiveOrZero = 1.0
    top_p: Annotated[float, Range(gt=0, le=1)] = 1.0
    max_prompt_tokens: Count = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class BetaConfig(Checked):
    """Config of stage 2.

    Attributes:
      model: the seed model, which is trained: directory, hub id or preset.
      sampler_model: the model of stage 1, which is sampled from; null: nothing is sampled, and each
        line of `problems`, a JSONL file, has the text of a `response`, which has to keep the format
        (cold start), or is a trace of a right answer (as of `npr-jax mine`).
      problems: JSONL file of problems and answers, or a directory of `npr-jax data prepare`.
      checker: says which answers are right: a Python file (its path ends in .py) or a module, with
        a function check(prediction, reference); null: equality of values (docs/answers.md).
      output: run directory; the trained model goes to its `final`.
      start: RUN@STEP, a checkpoint of another run of the stage, with whose accepted answers, state
        and place among them this one begins; null: with `model`, and answers of its own.
      seed: of the problems' order, of sampling and of the examples' order.
      engine: what decodes the answers.
      sample: how they are sampled and which are kept.
      fit: how long is trained on them, and how.
      mesh: the devices to train on; answers are decoded by replicas of mesh.tensor devices each.
      layout: what answers are learnt under: "strict", as the engine decodes; "reference", the
        released trainer's masks and positions; or "causal", as plain text.
      train_forced: whether tokens that the engine writes count too, as in the released code.
      branch_labels: says which branches of the answers are right, for `step_words`: a Python file
        or a module with a function label_branches(problem, branches) (docs/recipe.md); or null.
      step_words: two words of the vocabulary, one token each, for right and wrong: the model learns
        to say one of them behind every branch (`evaluate.verdicts`), and else what it learns
        without; null: none. It needs right branches and wrong ones, so answers that are given.
    """

    command: ClassVar[str] = "beta"

    model: str
    sampler_model: str | None
    problems: str
    checker: str | None = None
    output: str
    start: str | None = None
    seed: Seed = 0
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    sample: SampleConfig
    fit: FitConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    layout: Literal["strict", "reference", "causal"] = "strict"
    train_forced: bool = False
    branch_labels: str | None = None
    step_words: tuple[str, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.start is not None:
            parse_start(self.start)
        find_check(self.checker)
        if self.start is not None and self.sampler_model is None:
            raise ValueError(
                f"start is {self.start} and sampler_model null, needed is no start: it brings the "
                "answers that its run has sampled"
            )
        if self.branch_labels is not None:
            find_labels(self.branch_labels)
        if (self.branch_labels is None) != (self.step_words is None):
            raise ValueError(
                f"branch_labels is {self.branch_labels} and step_words {self.step_words}: labels "
                "say which of the words is learnt; set both, or both to null"
            )
        sampled = self.sampler_model is not None
        if self.step_words is not None and (
            sampled or self.layout != "strict" or self.engine.rules != PAPER
        ):
            raise ValueError(
                f"step_words is given with sampler_model {self.sampler_model}, layout "
                f"{self.layout!r} and engine.rules {self.engine.rules}, needed are null and "
                "'strict' (only right answers are kept of sampled ones) and the default rules"
            )
        if self.step_words is not None and self.train_forced:
            raise ValueError(
                "train_forced is true and step_words given, needed is false: the output at "
                "</step> cannot learn a verdict and what the engine writes there"
            )
        if self.mesh.rollout:
            raise ValueError(
                f"mesh.rollout is {self.mesh.rollout}, needed is 0: Beta samples before it trains"
            )
        self.engine.check_rows(self.layout)
        self.engine.check_trials()

    @property
    def loss(self) -> Objective:
        """What a train step minimises."""
        return self.fit.loss

    @property
    def train(self) -> TrainConfig:
        """How the stage trains."""
        return self.fit.train

    @property
    def rows(self) -> int:
        """Rows of an optimizer step whose answers are all as long as can be."""
        return self.fit.batch

    def advice(self, shards: int) -> str:
        """What helps where an optimizer step has fewer examples than the batch has parts."""
        return self.fit.advice(shards, "fit.batch")

    @property
    def depth(self) -> int:
        """Hidden intervals per token of a row: the tree's, and one for the row."""
        if self.layout == "reference":
            return reference_depth(self.engine.max_branches) + 1
        return self.engine.rules.intervals(MAX_DEPTH, self.engine.max_blocks) + 1


def run(config: BetaConfig, report: Report | None = None) -> Path:
    """Runs the stage, or goes on with it; returns the directory of the trained model.

    `report(metrics)`, if given, is called after every step in place of a progress line.
    """
    output = claim(config.output, dump_config(config), SIZES)
    final = output / "final"
    if gather(final.exists())[0]:
        return final
    with sigterm.watched():
        model = _train(config, output, report)
        publish_model(model, final)
    return final


def _train(config: BetaConfig, output: Path, report: Report | None) -> Model:
    mesh = make_mesh(config.mesh)
    config.fit.train.check(mesh, "fit.train")
    start = None
    if config.start is not None and not checkpoint_steps(checkpoints_of(output)):
        start = find_start(config.start, vars(config).keys(), config.fit.train)
        _take_answers(start, config, output / ACCEPTED)
    tokenizer = load_tokenizer(config.model)
    tags = TagIds.from_tokenizer(tokenizer)
    if config.sampler_model is None:
        records = given_records(config, tokenizer, tags)
        known = [Problem(record["problem"], record["answer"]) for record in records]
        answers = [record["accepted"][0] for record in records]
        claim_inputs(output, {"problems": problems_content(known, answers)})
    else:
        records = loop.run(Sampling(config, output / ACCEPTED, mesh, start), report)
    rules = tags.resolved(config.engine.rules)
    examples = make_examples(records, tags, config.layout, config.train_forced, rules)
    if not examples:
        raise ValueError(
            f"none of {len(records)} problems got an accepted answer in sample.tries="
            f"{config.sample.tries}: train {config.sampler_model} for longer, or raise sample.tries"
        )

    if config.step_words is not None:
        problems = [record["problem"] for record in records for _ in record["accepted"]]
        assert config.branch_labels is not None
        words = word_ids(tokenizer, config.step_words)
        label = find_labels(config.branch_labels)
        examples = judged(examples, problems, label, words, tags)

    def seed_model() -> Model:
        model = load(config.model, seed=config.seed, tags=True, mesh=mesh).merged()
        contents = {"model": model_content(config.model, model)}
        if start:
            start.check(contents)
        claim_inputs(output, contents)
        return model

    sizes = config.seed, "beta", mesh, config.depth
    body = Fit(seed_model, examples, config.fit, output / "fit", *sizes, start)
    return loop.run(body, report)


def given_records(config: BetaConfig, tokenizer, tags: TagIds) -> list[Record]:
    """Records of the answers that the file of problems has, right or wrong, in the order in which
    they would be sampled. Raises ValueError with file and line for one that is no tree, does not
    keep the format where it is a text, is longer than `sample.max_tokens`, or has more than
    `engine.max_blocks` blocks."""
    path, sizes = config.problems, config.sample
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {config.model} has no end-of-text token for answers")
    wrong = config.step_words is not None  # it learns from them, too
    rows = read_given(path, tokenizer, tags, config.engine.max_branches, MAX_DEPTH, wrong)
    order, records = shuffled(len(rows), config.seed, BETA), []
    for given in (rows[int(order[i])] for i in range(len(rows))):
        if given.prompt_len > sizes.max_prompt_tokens:
            continue
        if (length := len(given.ids) - given.prompt_len) > sizes.max_tokens:
            raise ValueError(
                f"{given.where}: the response has {length} tokens, sample.max_tokens is "
                f"{sizes.max_tokens}"
            )
        blocks, most = num_blocks(given.ids, given.prompt_len, tags), config.engine.max_blocks
        if most and blocks > most:
            raise ValueError(
                f"{given.where}: the response has {blocks} blocks, engine.max_blocks is {most}"
            )
        problem, answer, _ = given.problem
        about = {"problem": problem, "answer": answer, "prompt_len": given.prompt_len}
        records.append(Record(**about, tries=0, accepted=[given.ids], texts=[given.text]))
        if len(records) == sizes.num_problems:
            break
    if not records:
        raise ValueError(
            f"all prompts of {path} are longer than sample.max_prompt_tokens="
            f"{sizes.max_prompt_tokens}"
        )
    return records


def _take_answers(start: Start, config: BetaConfig, path: Path) -> None:
    """Writes the accepted answers of the run with which this one begins to `path`. Raises
    ValueError where that run sampled otherwise, or has none."""
    old = read_config(start.run / "config.yaml").get("sample")
    new = yaml.safe_load(dump_config(config))["sample"]
    for key in sorted(new):
        was = old.get(key) if isinstance(old, dict) else None
        if was != new[key]:
            raise ValueError(
                f"start is {start}: sample.{key} is {new[key]}, needed is that of {start.run}, "
                f"{was}: its accepted answers are trained on"
            )
    source = start.run / ACCEPTED
    if is_main() and not path.exists():
        if not source.is_file():
            raise ValueError(f"start is {start}: there is no {source} with its accepted answers")
        if not (records := source.read_bytes()).endswith(b"\n"):
            raise ValueError(f"start is {start}: {source} is damaged, for it ends within a line")
        with writing(path):
            write_atomically(path, records)


class Sampling(Body[list[Record], list[Record]]):
    """The body of rejection sampling: in each round a batch of problems is answered by the Zero
    model. The state is the records so far, one for every problem that was tried.

    Of several processes each samples its share, all know all records, and the first writes them to
    the JSONL file `path`. A round that SIGTERM or a crash cuts off is sampled again.
    """

    name, unit, shown = "beta sampling", "round", ("accepted_rate", "covered_rate")

    def __init__(
        self, config: BetaConfig, path: Path, mesh: Mesh | None = None, start: Start | None = None
    ):
        self.config, self.path, self.mesh, self.start = config, path, mesh, start
        self.directory = path.parent / "sampling"

    def begin(self) -> tuple[list[Record], "Records"]:
        config, sizes = self.config, self.config.sample
        assert config.sampler_model is not None  # or nothing is sampled
        with sigterm.interruptible():
            model = load(config.sampler_model, seed=config.seed, tags=True, mesh=self.mesh)
            problems, prompts = encode_problems(
                model.tokenizer, read_problems(config.problems), sizes.max_prompt_tokens
            )
        contents = {
            "sampler_model": model_content(config.sampler_model, model),
            "problems": problems_content(problems, prompts),
        }
        if self.start:
            self.start.check(contents)
        claim_inputs(self.path.parent, contents)
        self.model, self.engine = model, None
        order = shuffled(len(problems), config.seed, BETA)
        wanted = min(len(problems), sizes.num_problems or len(problems))
        chosen = [(problems[int(order[i])], prompts[int(order[i])]) for i in range(wanted)]
        self.batches = [chosen[i : i + sizes.batch] for i in range(0, wanted, sizes.batch)]
        self.total = len(self.batches)
        return [], Records(self.path, [len(batch) for batch in self.batches])

    def step(self, state: list[Record], number: int) -> tuple[list[Record], dict[str, Scalar]]:
        """The records of one round more."""
        config = self.config
        with sigterm.interruptible():
            if self.engine is None:
                self.engine = self._engine()
            found, metrics = _sample_batch(
                self.engine,
                self.batches[number - 1],
                config,
                (config.seed, BETA, number - 1),
            )
        return [*state, *found], metrics

    def finish(self, state: list[Record]) -> list[Record]:
        return state

    def remedies(self, training: bool) -> str:
        return self.config.engine.smaller()

    def _engine(self) -> Engine:
        """An engine that has the only copy of the weights that is left."""
        model, dtype = self.model, self.config.fit.train.compute_dtype
        assert model is not None  # one engine is made
        self.model = None
        params = engine_params(model.config, model.params, dtype, self.mesh)
        model = dataclasses.replace(model, params=params)
        return Engine(model, self.config.engine, local_decode_mesh(self.mesh))


def _sample_batch(engine: Engine, batch, config: BetaConfig, seeds) -> tuple[list[Record], dict]:
    """Records of a batch of (problem, prompt): an answer to each at a time, until it has enough."""
    sizes, row_len = config.sample, config.fit.train.row_len
    check = find_check(config.checker)
    sampling = SamplingParams(
        temperature=sizes.temperature,
        top_p=sizes.top_p,
        max_tokens=sizes.max_tokens,
        parallel=False,
    )
    records = [
        Record(
            problem=problem.problem,
            answer=problem.answer,
            tries=0,
            prompt_len=len(prompt),
            accepted=[],
            texts=[],
        )
        for problem, prompt in batch
    ]
    for attempt in range(sizes.tries):
        lacking = [i for i, r in enumerate(records) if len(r["accepted"]) < sizes.keep]
        if not lacking:
            break
        prompts = [batch[i][1] for i in lacking]
        references = [batch[i][0].answer for i in lacking]
        answers = roll_out(engine, prompts, references, sampling, (*seeds, attempt), check=check)
        accepted = [
            (lacking[number], answer.trajectory.token_ids.tolist(), answer.trajectory.text)
            for (number, _), answer in answers.items()
            if accepts(answer, engine.tags, row_len, config.engine.max_blocks)
        ]
        for i in lacking:
            records[i]["tries"] += 1
        for i, ids, text in gather_all(accepted):
            records[i]["accepted"].append(ids)
            records[i]["texts"].append(text)
    tries, accepted = sum(r["tries"] for r in records), sum(len(r["accepted"]) for r in records)
    return records, {
        "tries": tries,
        "accepted": accepted,
        "accepted_rate": accepted / tries,
        "covered_rate": sum(bool(r["accepted"]) for r in records) / len(records),
    }


def accepts(answer: Answer, tags: TagIds, row_len: int, max_blocks: int = 0) -> bool:
    """Whether Beta trains on an answer: finished, well-formed, correct, and fit for a row of
    `row_len` tokens with canonical framing, and of `max_blocks` blocks at most (0: any number)."""
    trajectory = answer.trajectory
    if trajectory.finish_reason != "stop" or answer.violations or not answer.correct:
        return False
    try:
        tokens = canonical(trajectory.token_ids, trajectory.prompt_len, tags, MAX_DEPTH)
    except TraceError:
        return False
    blocks = num_blocks(tokens, trajectory.prompt_len, tags)
    return len(tokens) <= row_len and (not max_blocks or blocks <= max_blocks)


def num_blocks(token_ids: Sequence[int] | np.ndarray, prompt_len: int, tags: TagIds) -> int:
    """Blocks of a response whose blocks are not nested: those of its trunk."""
    return int(np.sum(np.asarray(token_ids)[prompt_len:] == tags.guideline_open))


def make_examples(
    records: Iterable[Record],
    tags: TagIds,
    rule: str = "strict",
    train_forced: bool = False,
    rules: Rules = PAPER,
) -> list[Example]:
    """Accepted answers with canonical framing, as trees of these `rules`; what the engine will
    force is masked."""
    examples = []
    for record in records:
        for ids in record["accepted"]:
            tokens = canonical(ids, record["prompt_len"], tags, MAX_DEPTH)
            known = "strict" if rule == "causal" else rule
            tree = parse(
                tokens, record["prompt_len"], tags, known, max_depth=MAX_DEPTH, rules=rules
            )
            mask = loss_mask(tree, train_forced)
            if rule == "causal":
                tree = layout(len(tokens), prompt_len=tree.prompt_len)
            examples.append(Example(tokens, tree, mask))
    return examples
