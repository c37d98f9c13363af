"""Clients from the registry, unchanged, beside `npr-jax eval` and the trainer, and the blocks of
docs/serving.md as they are written. Run `make test-clients`.

NPR_CLIENTS is the folder of their virtual environments, NPR_CLIENTS_MODEL a model to serve in the
place of a small one that is made here.
"""

import json
import os
import random
import subprocess
import sys
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest
from serve_process import PAGE, block, started
from train_toy import problem, write_problems

from npr_jax.model import logits, token_logp
from npr_jax.model.pretrained import load

OPTIMISED = True  # only then is exact mode exact
pytestmark = pytest.mark.clients

NAME, PROBLEMS, TOKENS, TIE = "served", 16, 20, 1e-4
SIZES = {"dtype": "float32", "engine.lanes": 16, "engine.pages": 1024, "engine.page_size": 16}
ANSWER = {"max_tokens": 200, "temperature": 0}


def client(name: str) -> Path:
    """The folder of a client's programs."""
    venvs = Path(os.environ.get("NPR_CLIENTS", PAGE.parents[1] / ".venv-clients")).absolute()
    path = venvs / name / "bin"
    if not (path / "python").exists():
        message = f"{path}/python not found; `make test-clients` makes it"
        # Who names the folder wants the tests to run.
        (pytest.fail if "NPR_CLIENTS" in os.environ else pytest.skip)(message)
    return path


def run(command: list, folder: Path, programs: Path | None = None) -> str:
    """What a command says; it finds nothing on the web."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    if programs:
        offline["PATH"] = f"{programs}:{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env=os.environ | offline, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(request, tmp_path_factory):
    """The directory of a model, beside problems."""
    given = os.environ.get("NPR_CLIENTS_MODEL")
    found = Path(given) if given else request.getfixturevalue("home") / "tree"
    folder = tmp_path_factory.mktemp("clients")
    (folder / NAME).symlink_to(found.absolute())
    write_problems(folder / "problems.jsonl", PROBLEMS, seed=1, groups=2)
    return folder / NAME


@pytest.fixture(scope="module")
def port(model):
    with started(model, model.parent / "cache", sets=SIZES | {"name": NAME}) as (_, port, _):
        yield port


@pytest.fixture
def folder(model, tmp_path):
    (tmp_path / "problems.jsonl").symlink_to(model.parent / "problems.jsonl")
    return tmp_path


def post(port: int, path: str, **body):
    url, headers = f"http://127.0.0.1:{port}{path}", {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def samples(folder: Path, task: str) -> list[dict]:
    """What lm-eval has got, in the order of the task's lines."""
    (path,) = folder.glob(f"lm_eval/**/samples_{task}_*.jsonl")
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(found, key=lambda sample: sample["doc_id"])


@pytest.fixture(scope="module")
def evaluated(model):
    """What `npr-jax eval` answers to the problems, and how many of them rightly."""
    sets = SIZES | {f"sampling.{name}": value for name, value in ANSWER.items()}
    sets |= {"sampling.top_p": 1, "sampling.max_tokens": 1000}
    sets |= {"compilation_cache": model.parent / "cache"}
    command = [sys.executable, "-m", "npr_jax", "eval", "--model", model, "--samples", "1"]
    command += ["--benchmarks", f"problems={model.parent / 'problems.jsonl'}"]
    command += ["--output", model.parent / "eval"]
    command += [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
    run(command, PAGE.parents[1])
    text = (model.parent / "eval/traces/problems.jsonl").read_text(encoding="utf-8")
    end, found = load(model).tokenizer.eos_token, {}
    for trace in map(json.loads, text.splitlines()):
        said = "".join(trace["pieces"][trace["prompt_len"] :]).removesuffix(end)
        found[trace["problem"]] = said, trace["correct"]
    assert len(found) == PROBLEMS
    return found


def chat(port: int, content: str) -> str:
    messages = [{"role": "user", "content": content}]
    answer = post(port, "/v1/chat/completions", messages=messages, **ANSWER)
    return answer["choices"][0]["message"]["content"]


def test_the_page_with_curl(port, tmp_path):
    (answer,) = json.loads(run(["bash", "-euc", block("sh", "curl", port)], tmp_path))["choices"]
    assert answer["message"]["content"] and answer["finish_reason"] in ("stop", "length")


def test_the_page_with_openai(port, tmp_path):
    programs = client("openai")
    code = block("python", "openai", port)
    assert run([programs / "python", "-c", code], tmp_path).strip()
    code = code.replace("max_tokens=200", "max_tokens=200, temperature=0")
    assert run([programs / "python", "-c", code], tmp_path) == chat(port, "A:7+4;B:6*2;C:7*6?")


def test_the_page_with_lm_eval_says_what_npr_jax_eval_says(port, evaluated, folder):
    programs = client("lm_eval")
    (folder / "problems.yaml").write_text(block("yaml", "task: problems", port))
    said = run(["bash", "-euc", block("sh", "lm_eval", port, NAME)], folder, programs)
    found = {s["doc"]["problem"]: s["resps"][0][0] for s in samples(folder, "problems")}
    assert found == {name: text for name, (text, _) in evaluated.items()}
    right = sum(correct for _, correct in evaluated.values())
    assert sum(s["exact_match"] for s in samples(folder, "problems")) == right
    assert "exact_match" in said and (right or "NPR_CLIENTS_MODEL" in os.environ)


def test_the_page_with_lm_eval_as_a_chat_says_what_npr_jax_eval_says(port, evaluated, folder):
    """As the page says below its block."""
    text = block("sh", "lm_eval", port, NAME)
    for old, new in (
        ("--model local-completions", "--model local-chat-completions --apply_chat_template"),
        ("/v1/completions", "/v1/chat/completions"),
        (",tokenizer_backend=remote", ""),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "problems.yaml").write_text(block("yaml", "task: problems", port))
    run(["bash", "-euc", text], folder, client("lm_eval"))
    found = {s["doc"]["problem"]: s["resps"][0][0] for s in samples(folder, "problems")}
    assert found == {name: text for name, (text, _) in evaluated.items()}


def test_the_page_with_guidellm(port, folder):
    run(["bash", "-euc", block("sh", "guidellm", port)], folder, client("guidellm"))
    (found,) = json.loads((folder / "guidellm.json").read_text(encoding="utf-8"))["benchmarks"]
    requests = found["requests"]
    assert not requests["errored"] and len(requests["successful"]) == PROBLEMS
    assert all(r["output_metrics"]["text_tokens"] > 0 for r in requests["successful"])


LIKELIHOODS = """
task: likelihoods
dataset_path: json
dataset_kwargs: {data_files: {test: likelihoods.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{problem}}"
doc_to_target: "{{continuation}}"
target_delimiter: ""
metric_list: [{metric: perplexity}, {metric: acc}]
"""


@pytest.fixture(scope="module")
def scored(model, port):
    """Continuations of about twenty tokens, some of them the model's own; and of each the sum of
    the trainer's log-probs, that of exact mode, and whether all its tokens are the likeliest (None:
    too close to tell)."""
    rng, served = random.Random(3), load(model)
    tokenizer = served.tokenizer
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token else []
    rows, answers = [], []
    for number in range(PROBLEMS):
        question, response, _ = problem(rng)
        own = {"prompt": question, "max_tokens": TOKENS, "temperature": 0, "parallel": False}
        continuation = post(port, "/v1/completions", **own)["choices"][0]["text"]
        if number % 4 == 1:
            continuation = "".join(rng.sample(response[-30:], TOKENS))
        elif number % 4 == 2:
            continuation = continuation[:-1] + rng.choice("0123456789")
        head = [*begin, *tokenizer.encode(question, add_special_tokens=False)]
        ids = np.array([[*head, *tokenizer.encode(continuation, add_special_tokens=False)]], "i4")
        positions = np.arange(ids.size, dtype="i4")[None]
        args = served.config, served.params, ids, positions, np.zeros((*ids.shape, 1, 2), "i4")
        score = jax.jit(token_logp, static_argnums=(0, 6))
        logp = [np.asarray(score(*args, positions - 1, exact))[0] for exact in (False, True)]
        sums = [row[len(head) :].sum(dtype=np.float64) for row in logp]
        z = np.asarray(jax.jit(logits, static_argnums=0)(*args))[0, len(head) - 1 : -1]
        said = z[np.arange(len(z)), ids[0, len(head) :]]
        best, second = np.sort(z)[:, -1], np.sort(z)[:, -2]
        greedy = (said == best).all()
        clear = (best - second > TIE).all() if greedy else (said < best - TIE).any()
        rows.append({"problem": question, "continuation": continuation})
        answers.append((*sums, bool(greedy) if clear else None))
    found = {greedy for *_, greedy in answers}
    assert found >= {True, False} or "NPR_CLIENTS_MODEL" in os.environ
    return rows, answers


WAYS = {
    "token ids": "tokenizer_backend=remote,num_concurrent=8",
    "texts": "tokenizer_backend=remote,tokenized_requests=False",
    "batches, its own tokenizer": "tokenizer_backend=huggingface,tokenizer=MODEL --batch_size 4",
}


def likelihoods(port: int, model: Path, scored, folder: Path, way: str) -> list[float]:
    """What lm-eval has got in one of these ways, whose flags for the likeliest are right."""
    rows, answers = scored
    (folder / "likelihoods.yaml").write_text(LIKELIHOODS)
    (folder / "likelihoods.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = block("sh", "lm_eval", port, NAME).replace("tasks problems", "tasks likelihoods")
    ours = WAYS[way].replace("MODEL", str(model))
    text = text.replace("tokenizer_backend=remote,num_concurrent=16", ours)
    run(["bash", "-euc", text], folder, client("lm_eval"))
    told = [sample["filtered_resps"][0] for sample in samples(folder, "likelihoods")]
    for (_, flag), (*_, greedy) in zip(told, answers, strict=True):
        assert greedy is None or str(flag) == str(greedy)
    return [float(total) for total, _ in told]


@pytest.mark.parametrize("way", WAYS)
def test_log_likelihoods_of_lm_eval_are_the_trainers(port, model, scored, folder, way, report):
    """To 1e-5; of unlikely texts, whose sums are large, as well as float32 can tell."""
    sums = np.array([total for total, _, _ in scored[1]])
    gaps = np.abs(likelihoods(port, model, scored, folder, way) - sums)
    report(f"largest gap {gaps.max():.1e}, of sums from {sums.min():.1f} to {sums.max():.1f}")
    assert (gaps < 1e-5 * np.maximum(1, -sums / 10)).all()


def test_log_likelihoods_of_lm_eval_in_exact_mode_have_the_trainers_bits(model, scored, folder):
    exact = {"engine.exact": True, "engine.lanes": 4, "name": NAME}
    with started(model, model.parent / "cache", sets=SIZES | exact) as (_, port, _):
        found = likelihoods(port, model, scored, folder, "token ids")
    np.testing.assert_allclose(found, [total for _, total, _ in scored[1]], rtol=1e-13)


def test_every_prompt_begins_once(port, model):
    """Ids, text and a chat, whether they bring the beginning or not, are one prompt."""
    tokenizer, question = load(model).tokenizer, "A:7+4;B:6+2?"
    ids = tokenizer.encode(question, add_special_tokens=False)
    if tokenizer.chat_template or not tokenizer.bos_token:
        pytest.skip("its chats have more in them, or its texts have no beginning")
    begin = tokenizer.bos_token_id
    found = [
        post(port, "/v1/completions", prompt=prompt, **ANSWER)
        for prompt in (ids, [begin, *ids], question, tokenizer.bos_token + question)
    ]
    messages = [{"role": "user", "content": question}]
    found.append(post(port, "/v1/chat/completions", messages=messages, **ANSWER))
    assert {answer["usage"]["prompt_tokens"] for answer in found} == {len(ids) + 1}
    (first, *others) = (answer["choices"][0] for answer in found)
    assert {c.get("text") or c["message"]["content"] for c in others} == {first["text"]}
    for body in ({"prompt": question}, {"messages": messages}):
        assert post(port, "/tokenize", **body)["tokens"] == [begin, *ids]
