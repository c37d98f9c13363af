"""The server: what it answers is what the engine says, in every form."""

import dataclasses
import itertools
import json
import re

import bigram
import pytest
from fake_device import engine_on_fake_device
from pydantic import TypeAdapter
from serve_toy import (
    CHAT,
    COMPLETION,
    CONFIG,
    ENGINE,
    PROMPTS,
    RESPONSES,
    Digits,
    serving,
)

from npr_jax.decode import Event, SamplingParams
from npr_jax.evaluate.traces import read_trace
from npr_jax.serve import protocol
from npr_jax.serve.openapi import description
from npr_jax.serve.order import Piece, Reasoning

pytestmark = pytest.mark.usefixtures("plans_without_numbers")


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running
        running.idle()


def in_process(prompt: str, **sampling):
    """What an engine alone answers."""
    ids = [0, *Digits().encode(prompt, False)]
    engine = engine_on_fake_device(ENGINE, tokenizer=Digits())
    return engine.generate([ids], SamplingParams(**sampling))


def joined(pieces: list[dict], field: str = "text") -> dict[int, str]:
    """The text of each choice; every choice has one finish reason, on its last piece."""
    texts: dict[int, str] = {}
    over: set[int] = set()
    for piece in pieces:
        for choice in piece["choices"]:
            index = choice["index"]
            assert index not in over, "a piece after the finish"
            text = choice["text"] if field == "text" else choice["delta"].get(field, "")
            texts[index] = texts.get(index, "") + text
            if choice["finish_reason"] is not None:
                over.add(index)
    assert over == set(texts)
    return texts


SAID = [(prompt, parallel) for prompt in PROMPTS for parallel in (True, False)]


@pytest.mark.parametrize(("prompt", "parallel"), SAID)
def test_an_answer_is_the_same_at_once_in_pieces_and_in_process(server, prompt, parallel):
    body = {"prompt": prompt, "max_tokens": 160, "n": 2, "parallel": parallel}
    whole = server.post(COMPLETION, **body)
    pieces = server.stream(COMPLETION, **body, stream_options={"include_usage": True})
    answers = in_process(prompt, max_tokens=160, n=2, parallel=parallel)
    texts = {c["index"]: c["text"] for c in whole["choices"]}
    assert texts == {i: answer.text for i, answer in enumerate(answers)}
    assert joined(pieces[:-1]) == texts
    for choice, answer in zip(whole["choices"], answers, strict=True):
        cut = answer.finish_reason in ("length", "branch_length")
        assert choice["finish_reason"] == ("length" if cut else "stop")
        if answer.finish_reason not in ("stop", "length"):
            assert choice["finish_detail"].startswith(answer.finish_reason)
    # Exact usage, the same in the last piece, null in all others.
    usage = whole["usage"]
    assert usage["prompt_tokens"] == 1 + len(prompt) // 2
    assert usage["completion_tokens"] == sum(len(answer.response_ids) for answer in answers)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["critical_path"] == max(answer.stats["critical_path"] for answer in answers)
    assert pieces[-1]["choices"] == [] and all(piece["usage"] is None for piece in pieces[:-1])
    cached = "prompt_tokens_details"
    assert {**pieces[-1]["usage"], cached: 0} == {**usage, cached: 0}


def test_some_of_these_answers_have_branches_nested_ones_and_all_kinds_of_ends():
    answers = [
        answer
        for prompt, parallel in SAID
        for answer in in_process(prompt, max_tokens=160, parallel=parallel)
    ]
    assert max(answer.layout.depth for answer in answers) == 3
    reasons = {answer.finish_reason for answer in answers}
    assert {"stop", "branch_eos", "branch_length"} <= reasons


def test_later_branches_are_held_back_and_then_come_at_once(server):
    seen = 0
    for prompt in PROMPTS:
        body = {"prompt": prompt, "max_tokens": 160}
        branches = server.stream(COMPLETION, **body, stream_branches=True)
        happened = [piece["choices"][0]["branch"] for piece in branches]
        (finish,) = [event for event in happened if event["event"] == "finish"]
        trace = finish["trace"]
        told = {
            (str(event["branch"]), event["position"] + number): token
            for event in happened
            for number, token in enumerate(event.get("tokens", ()))
        }
        # Every token of the trace was told: where, with its log-prob, and who wrote it.
        layout, paths = _layout(trace)
        for at in range(trace["prompt_len"], len(layout)):
            token = told.pop((paths[at], int(layout.positions[at])))
            assert token["id"] == trace["token_ids"][at] and token["forced"] == trace["forced"][at]
            assert token["logprob"] == pytest.approx(trace["logp"][at], abs=1e-4)
        assert not told
        lines = [str(e["branch"]) for e in happened if e["event"] == "tokens"]
        turns = [line for line, after in itertools.pairwise(lines) if line != after]
        seen += len(turns) > len(set(turns)) + 1  # siblings come in turns
        assert finish["viewer"]["packed"]
    assert seen > 2


def _layout(trace: dict):
    """The layout of a trace, and the branch of each of its tokens, from the spans of its blocks."""
    layout = read_trace(json.dumps(trace)).layout
    paths: list[list] = [[] for _ in range(len(layout))]
    for block in sorted(layout.blocks, key=lambda block: block.depth):
        number = sum(
            other.depth == block.depth
            and other.start < block.start
            and paths[other.start] == paths[block.start]
            for other in layout.blocks
        )
        for i, (begin, end) in enumerate(block.branches):
            for at in range(begin, end):
                paths[at] = [*paths[block.start], [number, i]]
    return layout, [str(path) for path in paths]


def test_blocks_are_told_apart_from_the_answer(server):
    tags = bigram.TAGS
    told = 0
    for first, second in itertools.product(range(9, 23), range(9, 23, 4)):
        turn = {"role": "user", "content": f"{first:02d}{second:02d}"}
        body = {"messages": [turn], "max_tokens": 120, "instruction": ""}
        plain = server.post(CHAT, **body)["choices"][0]["message"]["content"]
        message = server.post(CHAT, **body, separate_reasoning=True)["choices"][0]["message"]
        pieces = server.stream(CHAT, **body, separate_reasoning=True)
        assert joined(pieces, "content")[0] == message["content"]
        reasoning = "".join(
            piece["choices"][0]["delta"].get("reasoning_content", "") for piece in pieces
        )
        assert reasoning == message["reasoning_content"]
        said = blocks = ""
        depth = 0
        for token in re.findall("..", plain):
            opens, closes = int(token) == tags.guideline_open, int(token) == tags.takeaway_close
            if depth or opens:
                blocks += token
            else:
                said += token
            depth += opens - (closes and depth > 0)
        assert (said, blocks) == (message["content"], reasoning)
        told += bool(blocks and said)
    assert told > 5


def test_a_chat_begins_with_the_role_and_responses_tell_their_events(server):
    body = {"messages": [{"role": "user", "content": "12"}], "max_tokens": 30, "n": 2, "seed": 1}
    pieces = server.stream(CHAT, **body)
    assert [p["choices"][0]["delta"] for p in pieces[:2]] == [
        {"role": "assistant", "content": ""}
    ] * 2
    assert all("role" not in piece["choices"][0]["delta"] for piece in pieces[2:])
    texts = [c["message"]["content"] for c in server.post(CHAT, **body)["choices"]]
    assert list(joined(pieces, "content").values()) == texts
    body = {"input": "12", "max_output_tokens": 30, "seed": 1}
    whole = server.post(RESPONSES, **body)
    events = server.stream(RESPONSES, **body)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    text = "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
    assert text == texts[0] == whole["output"][0]["content"][0]["text"]
    assert events[0]["type"] == "response.created"
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{whole['status']}"
    ignored = {"id": "", "created_at": 0, "output": [], "usage": None}
    assert last | ignored == whole | ignored


def test_a_conversation_goes_through_the_template(server):
    turns = [
        {"role": "developer", "content": "11"},
        {"role": "user", "content": "12"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "3"}]},
    ]
    asked = server.post("/tokenize", messages=turns, instruction="")
    assert asked["tokens"] == [0, 1, 11, 1, 12, 1, 1, 13]
    with_instruction = server.post("/tokenize", messages=turns, instruction="14")
    assert with_instruction["tokens"] == [0, 1, 11, 1, 12, 1, 1, 13, 14]
    answer = server.post(CHAT, messages=turns, instruction="", max_tokens=5)
    assert answer["usage"]["prompt_tokens"] == asked["count"]


def test_every_prompt_begins_once(server):
    """Text, ids and a chat get one beginning-of-text token, whether they bring it or not."""
    for prompt in ("1213", "001213", [12, 13], [0, 12, 13]):
        answer = server.post(COMPLETION, prompt=prompt, max_tokens=40, seed=3)
        assert answer["usage"]["prompt_tokens"] == 3
        assert answer["choices"][0]["text"] == in_process("1213", max_tokens=40, seed=3)[0].text
    ids = server.post("/tokenize", prompt="1213")["tokens"]
    assert ids == [0, 12, 13] and server.post("/detokenize", tokens=ids) == {"prompt": "001213"}
    assert server.post("/tokenize", prompt="1213", add_special_tokens=False)["tokens"] == [12, 13]


def test_prompts_of_a_batch_are_answered_in_order(server):
    batch = server.post(COMPLETION, prompt=PROMPTS, max_tokens=40, n=2, seed=5)
    texts = [choice["text"] for choice in batch["choices"]]
    assert [choice["index"] for choice in batch["choices"]] == list(range(2 * len(PROMPTS)))
    alone = [
        choice["text"]
        for prompt in PROMPTS
        for choice in server.post(COMPLETION, prompt=prompt, max_tokens=40, n=2, seed=5)["choices"]
    ]
    assert texts == alone
    pieces = server.stream(COMPLETION, prompt=PROMPTS, max_tokens=40, n=2, seed=5)
    assert [text for _, text in sorted(joined(pieces).items())] == texts


def test_a_request_without_a_seed_gets_one(server):
    body = protocol.CompletionRequest(prompt="12")
    seeds = {server.server.asker.completion(body).sampling.seed for _ in range(5)}
    assert len(seeds) == 5


def test_stop_texts_end_an_answer(server):
    free = in_process("12", max_tokens=60, seed=0, parallel=False)[0].text
    assert free is not None and len(free) > 8
    stop = free[5:8]
    body = {"prompt": "12", "max_tokens": 60, "seed": 0, "parallel": False, "stop": ["x", stop]}
    (choice,) = server.post(COMPLETION, **body)["choices"]
    assert choice["finish_reason"] == "stop" and choice["text"] == free[: free.index(stop)]
    assert joined(server.stream(COMPLETION, **body))[0] == choice["text"]


def test_more_tokens_than_there_are_pages_for_are_no_error():
    """A line ends where its pages would, as at the model's last position."""
    with serving(dataclasses.replace(CONFIG, engine=dataclasses.replace(ENGINE, pages=40))) as some:
        longest = some.ask("GET", "/v1/models")[2]["data"][0]["max_model_len"]
        assert longest < 160
        body = {"prompt": "12", "ignore_eos": True, "parallel": False, "max_tokens": 10**5}
        answer = some.post(COMPLETION, **body)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["total_tokens"] == longest
        some.post(COMPLETION, prompt="12" * (longest - 2))  # the default of max_tokens is 16
        some.post(COMPLETION, 400, prompt="12" * longest)


def test_the_rest_of_a_character_is_reasoning_inside_a_block():
    reasoning = Reasoning(bigram.TAGS)
    assert reasoning.flush("\ufffd") == ("", "\ufffd")
    opens = Event("token", 0, token_id=bigram.TAGS.guideline_open)
    assert reasoning.add(Piece("32", opens)) == ("32", "")
    assert reasoning.flush("\ufffd") == ("\ufffd", "")


def test_what_may_begin_a_stop_text_stays_in_its_place(server):
    stop = (
        f"{bigram.TAGS.guideline_close:02d}x"  # which the trunk's last token before a fork begins
    )
    for prompt in PROMPTS:
        body = {"prompt": prompt, "max_tokens": 120, "seed": 0}
        free = server.post(COMPLETION, **body)["choices"][0]["text"]
        assert server.post(COMPLETION, **body, stop=stop)["choices"][0]["text"] == free
        assert joined(server.stream(COMPLETION, **body, stop=stop))[0] == free


def test_answers_are_as_the_description_says(server):
    """Every answer has the fields of its typed dict, and no others."""
    chat = {"messages": [{"role": "user", "content": "12"}], "max_tokens": 20}
    for kind, answer in (
        (protocol.CompletionAnswer, server.post(COMPLETION, prompt="12", max_tokens=20)),
        (protocol.ChatAnswer, server.post(CHAT, **chat)),
        (protocol.ResponsesAnswer, server.post(RESPONSES, input="12", max_output_tokens=20)),
        (protocol.ModelList, server.ask("GET", "/v1/models")[2]),
        (protocol.TokenizeAnswer, server.post("/tokenize", prompt="12", return_token_strs=True)),
        (protocol.DetokenizeAnswer, server.post("/detokenize", tokens=[12])),
        (protocol.TokenizerInfo, server.ask("GET", "/tokenizer_info")[2]),
        (protocol.Health, server.ask("GET", "/health")[2]),
        (protocol.Version, server.ask("GET", "/version")[2]),
    ):
        TypeAdapter(kind).validate_python(answer, strict=True)
        assert set(answer) <= set(kind.__annotations__), kind
    found = server.ask("GET", "/openapi.json")[2]
    assert found == json.loads(json.dumps(description()))
    routes = {route.path for route in server.server.app.routes}
    described = {re.sub("(model|id)}", r"\1:path}", path) for path in found["paths"]}
    assert routes - described == {"/", "/metrics", "/openapi.json"} and not described - routes


class Halves(Digits):
    """Says a half of a pair of UTF-16 for every token; fails with many if it shall."""

    fails = False

    def decode(self, ids, clean_up_tokenization_spaces=True):
        if self.fails and len(ids) > 30:
            raise RuntimeError("a tokenizer that fails")
        return "\ud800" * len(ids)


def test_a_tokenizer_may_say_or_do_what_it_likes():
    tokenizer = Halves()
    with serving(tokenizer=tokenizer) as server:
        body = {"prompt": "1421", "max_tokens": 60, "seed": 1}
        (choice,) = server.post(COMPLETION, **body)["choices"]
        assert set(choice["text"]) == {"?"}
        assert joined(server.stream(COMPLETION, **body))[0] == choice["text"]
        tokenizer.fails = True
        body |= {"prompt": "12" * 40, "stream_branches": True}
        pieces = server.stream(COMPLETION, **body)  # with the prompt's text at its finish
        assert pieces[-1]["error"]["message"] == "The server failed."
        server.idle()
        assert server.ask("GET", "/health")[0] == 200


def test_a_model_without_tags_is_served_sequentially_and_says_so():
    with serving(tags=None) as server:
        assert server.ask("GET", "/v1/models")[2]["data"][0]["parallel"] is False
        answer = server.post(COMPLETION, prompt="12", max_tokens=20, seed=1)
        alone = in_process("12", max_tokens=20, seed=1, parallel=False)[0]
        assert answer["choices"][0]["text"] == alone.text
        error = server.post(COMPLETION, 400, prompt="12", parallel=True)["error"]
        assert error["param"] == "parallel" and "sequentially" in error["message"]


def test_the_description_promises_what_can_come():
    paths = description()["paths"]
    assert set(paths["/health"]["get"]["responses"]) == {"200", "503"}
    assert set(paths["/v1/models"]["get"]["responses"]) == {"200", "401", "503"}
    needed = {"200", "400", "401", "404", "408", "413", "415", "429", "503"}
    assert set(paths[CHAT]["post"]["responses"]) == needed
