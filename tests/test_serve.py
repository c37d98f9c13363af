"""The server: what it answers is what the engine says, in every form, and nothing is held after."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import re
import socket
import threading
import time

import bigram
import pytest
import uvicorn
from conftest import spread
from fake_device import engine_on_fake_device
from pydantic import TypeAdapter
from serve_toy import CONFIG, ENGINE, Digits, pieces_of, serving
from uvicorn.server import ServerState

from npr_jax.decode import Event, SamplingParams, fork_join
from npr_jax.evaluate.traces import read_trace
from npr_jax.serve import answering, protocol
from npr_jax.serve.openapi import description
from npr_jax.serve.order import Piece, Reasoning
from npr_jax.serve.server import http_protocol

JSON = {"Content-Type": "application/json"}
COMPLETION, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
# What the fake device goes on with has branches, nested ones, and every kind of end.
PROMPTS = ["1421", "1516", "1620", "1120", "1414", "1812", "1212"]


@pytest.fixture(autouse=True)
def plans_without_numbers(monkeypatch):
    monkeypatch.setattr(fork_join, "check_block", bigram.check_block_without_numbers)


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


BAD = [
    (COMPLETION, {"prompt": 5}, "prompt"),
    (COMPLETION, {"prompt": []}, "prompt"),
    (COMPLETION, {"prompt": [40]}, "prompt"),
    (COMPLETION, {"prompt": [-1]}, "prompt"),
    (COMPLETION, {"prompt": [1, "a"]}, "prompt"),
    (COMPLETION, {"prompt": ["1"] * 1000}, "prompt"),
    (COMPLETION, {"prompt": "12" * 2000}, "prompt"),
    (COMPLETION, {"prompt": "12", "max_tokens": 0}, "max_tokens"),
    (COMPLETION, {"prompt": "12", "max_tokens": -1}, "max_tokens"),
    (COMPLETION, {"prompt": "12", "max_tokens": 1.5}, "max_tokens"),
    (COMPLETION, {"prompt": "12", "max_tokens": "5"}, "max_tokens"),
    (COMPLETION, {"prompt": "12", "max_tokens": 10**30}, "max_tokens"),
    (COMPLETION, {"prompt": "12", "temperature": -0.1}, "temperature"),
    (COMPLETION, {"prompt": "12", "top_p": 0}, "top_p"),
    (COMPLETION, {"prompt": "12", "top_p": 1.1}, "top_p"),
    (COMPLETION, {"prompt": "12", "top_k": -2}, "top_k"),
    (COMPLETION, {"prompt": "12", "n": 0}, "n"),
    (COMPLETION, {"prompt": "12", "n": 1000}, "n"),
    (COMPLETION, {"prompt": "12", "logprobs": 21}, "logprobs"),
    (COMPLETION, {"prompt": "12", "logprobs": -1}, "logprobs"),
    (COMPLETION, {"prompt": "12", "stop": ""}, "stop"),
    (COMPLETION, {"prompt": "12", "stop": ["1"] * 17}, "stop"),
    (COMPLETION, {"prompt": "12", "seed": 2**63}, "seed"),
    (COMPLETION, {"prompt": "12", "logit_bias": {"40": 1}}, "logit_bias"),
    (COMPLETION, {"prompt": "12", "logit_bias": {"x": 1}}, "logit_bias"),
    (COMPLETION, {"prompt": "12", "logit_bias": {"3": 101}}, "logit_bias"),
    (COMPLETION, {"prompt": "12", "presence_penalty": 2.1}, "presence_penalty"),
    (COMPLETION, {"prompt": "12", "best_of": 2}, "best_of"),
    (COMPLETION, {"prompt": "12", "suffix": "1"}, "suffix"),
    (COMPLETION, {"prompt": "12", "stream_options": {}}, "stream_options"),
    (COMPLETION, {"prompt": "12", "stream_branches": True}, "stream_branches"),
    (COMPLETION, {"prompt": "12", "max_branches": 9}, "max_branches"),
    (COMPLETION, {"prompt": "12", "max_depth": 9}, "max_depth"),
    (COMPLETION, {"prompt": "12", "min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    (COMPLETION, {"prompt": "12", "stop_token_ids": [40]}, "stop_token_ids"),
    (COMPLETION, {"prompt": "12", "stop_token_ids": list(range(10))}, "stop_token_ids"),
    (COMPLETION, {"prompt": ""} | {"model": "toy", "prompt": None}, "prompt"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hello"}, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    (CHAT, {"messages": [{"content": "12"}]}, "messages"),
    (CHAT, {"messages": [{"role": "assistant", "content": "12"}]}, "messages"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{}]}] * 2}, "messages"),
    (CHAT, {"top_logprobs": 5}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"separate_reasoning": True, "stream_branches": True}, "separate_reasoning"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"chat_template_kwargs": {"fail": True}}, "messages"),
    (CHAT, {"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    (RESPONSES, {"input": ""}, "input"),
    (RESPONSES, {"input": "12", "previous_response_id": "a"}, "previous_response_id"),
    (RESPONSES, {"input": "12", "tools": [{}]}, "tools"),
    (RESPONSES, {"input": "12" * 1591}, "input"),
    (RESPONSES, {"input": "12" * 3000}, "input"),
    (RESPONSES, {"input": "12", "metadata": {"a": float("nan")}}, "metadata"),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "1", "messages": [{"role": "user", "content": "1"}]}, "prompt"),
    ("/detokenize", {"tokens": [40]}, "tokens"),
    ("/detokenize", {"tokens": ["a"]}, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD)
def test_what_a_client_does_wrong_is_named(server, path, body, param):
    if path == CHAT:
        body = {"messages": [{"role": "user", "content": "12"}]} | body
    for stream in (False, True):
        if stream and (not path.startswith("/v1") or param.startswith("stream")):
            continue
        error = server.post(path, 400, **body, **({"stream": True} if stream else {}))["error"]
        assert error["param"] == param and param in error["message"], error
        assert error["type"] == "invalid_request_error"
        TypeAdapter(protocol.ErrorObject).validate_python(error)


RAW = [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": "\xff"}', b'{"prompt": "12", "n": NaN}']
RAW += [b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt": "12", "n": 1' + b"0" * 5000 + b"}"]
RAW += [b'{"prompt": "\\ud800"}', b'{"prompt": "12", "temperature": Infinity}']


@pytest.mark.parametrize("raw", RAW, ids=range(len(RAW)))
def test_what_is_no_body_is_refused(server, raw):
    for path in (COMPLETION, CHAT, RESPONSES, "/detokenize"):
        status, _, answer = server.ask("POST", path, raw)
        assert status == 400 and set(answer["error"]) == {"message", "type", "param", "code"}


MILLION = 10**6
MANY = ",".join(f'"{i}":"x"' for i in range(MILLION)).encode()
LARGE = [
    ("prompt", b'{"prompt": [' + b"1," * MILLION + b'"x"]}'),
    ("prompt", b'{"prompt": [' + b"1.5," * MILLION + b"1]}"),
    ("prompt", b'{"prompt": [[' + b"1.5," * MILLION + b"1]]}"),
    ("prompt", b'{"prompt": "' + b"12" * MILLION + b'"}'),
    ("logit_bias", b'{"prompt": "12", "logit_bias": {%s}}' % MANY),
    ("stop", b'{"prompt": "12", "stop": [' + b"1," * MILLION + b"1]}"),
]


@pytest.mark.parametrize(("param", "raw"), LARGE, ids=range(len(LARGE)))
def test_a_body_with_a_million_faults_has_one_error_soon(server, param, raw):
    begun = time.monotonic()
    status, _, answer = server.ask("POST", COMPLETION, raw)
    assert status == 400 and answer["error"]["param"] == param
    assert time.monotonic() - begun < 3


def test_a_large_text_keeps_nobody_waiting():
    class Slow(Digits):
        def encode(self, text, add_special_tokens=True):
            time.sleep(1.5 if len(text) > 1000 else 0)
            return super().encode(text, add_special_tokens)

    with serving(tokenizer=Slow()) as server:
        body = {"prompt": "12" * 1000, "max_tokens": 1, "colour": "x" * 70_000}
        thread = threading.Thread(target=server.post, args=(COMPLETION,), kwargs=body)
        thread.start()
        time.sleep(0.3)
        begun = time.monotonic()
        assert server.ask("GET", "/health")[0] == 200
        assert time.monotonic() - begun < 0.9 and thread.is_alive()
        thread.join()


def test_a_body_of_another_type_is_refused_and_an_error_is_short(server):
    for kind in ("", "text/plain", "application/x-www-form-urlencoded"):
        headers = {"Content-Type": kind}
        status, _, answer = server.ask("POST", COMPLETION, {"prompt": "12"}, headers)
        assert status == 415 and "application/json" in answer["error"]["message"]
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert server.ask("POST", COMPLETION, {"prompt": "12"}, headers)[0] == 200
    for body in ({"prompt": "12", "model": "x" * 10**5}, {"prompt": "12", "n": "x" * 10**5}):
        status, _, answer = server.ask("POST", COMPLETION, body)
        assert status in (400, 404) and len(answer["error"]["message"]) < 1100


def test_other_paths_and_methods_and_models_are_errors_in_json(server):
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", COMPLETION, 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/other", 404),
        ("DELETE", "/v1/requests/none", 404),
        ("POST", "/v1/reload", 404),
    ):
        found, _, answer = server.ask(method, path)
        assert found == status and answer["error"]["message"], (method, path, found)
    error = server.post(COMPLETION, 404, prompt="12", model="other")["error"]
    assert error["code"] == "model_not_found" and error["param"] == "model"
    assert server.ask("GET", "/v1/models/toy")[2]["id"] == "toy"


def test_an_unknown_field_is_ignored_and_named(server):
    status, headers, _ = server.ask("POST", COMPLETION, {"prompt": "12", "colour": 1, "size": 2})
    assert status == 200 and headers["x-ignored-fields"] == "colour, size"


def test_the_name_of_an_unknown_field_is_no_header_of_its_own(server):
    for name in ("a\r\nSet-Cookie: b", "a\0b", "ü\u2028", "\x7f"):
        status, headers, _ = server.ask("POST", COMPLETION, {"prompt": "12", name: 1})
        assert status == 200 and "set-cookie" not in headers
        assert headers["x-ignored-fields"] == name.encode("unicode_escape").decode()


def test_the_id_of_a_request_is_echoed_or_made(server):
    for given, same in (("abc-1", True), ("", False), ("x" * 200, False)):
        body, headers = {"prompt": "12", "max_tokens": 2}, {"X-Request-Id": given}
        _, found, answer = server.ask("POST", COMPLETION, body, headers)
        assert (found["x-request-id"] == given) == same
        assert answer["id"] == f"cmpl-{found['x-request-id']}"


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


def test_metrics_count_exactly():
    with serving() as server:
        answers = [
            server.post(COMPLETION, prompt=prompt, max_tokens=30, n=2, seed=1) for prompt in PROMPTS
        ]
        server.post(COMPLETION, 400, prompt=5)
        server.idle()
        figures = server.figures()
        usage = [answer["usage"] for answer in answers]
        for name in ("prompt", "completion"):
            shown = {"prompt": "prompt", "completion": "generation"}[name]
            total = sum(some[f"{name}_tokens"] for some in usage)
            assert figures[f"npr_{shown}_tokens_total"] == total
        ended = {k: v for k, v in figures.items() if k.startswith("npr_answers_finished_total")}
        assert sum(ended.values()) == 2 * len(PROMPTS)
        route = f'route="{COMPLETION}"'
        assert figures[f'npr_http_requests_total{{{route},status="200"}}'] == len(PROMPTS)
        assert figures[f'npr_http_requests_total{{{route},status="400"}}'] == 1
        for name in ("time_to_first_token", "request"):
            assert figures[f"npr_{name}_seconds_count"] == len(PROMPTS)


def test_a_key_is_asked_for():
    with serving(key="sécret") as server:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            headers = {"Authorization": ""} | given
            status, found, answer = server.ask("GET", "/v1/models", None, headers)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
            assert found["www-authenticate"] == "Bearer"
            assert server.ask("GET", "/health", None, headers)[0] == 200
            assert server.ask("GET", "/tokenizer_info", None, headers)[0] == 401
        right = {"Authorization": "Bearer sécret".encode()}
        assert server.ask("GET", "/v1/models", None, right)[0] == 200


LONG = {"max_tokens": 1000, "ignore_eos": True, "parallel": False, "prompt": "12"}


def slow(server, seconds: float = 0.005) -> None:
    """Every visit takes so long from now on."""
    runner = server.server.engine.engine.runner
    decode = runner._steps.decode

    def wait(*arguments):
        time.sleep(seconds)
        return decode(*arguments)

    runner._steps = runner._steps._replace(decode=wait)


def test_more_than_the_queue_holds_is_refused_and_may_come_later():
    with serving(dataclasses.replace(CONFIG, max_requests=3)) as server:
        slow(server)
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(asking(server, **LONG, stream=True))
            status, headers, answer = server.ask("POST", COMPLETION, {"prompt": "12"})
            assert status == 429 and int(headers["retry-after"]) >= 1
            assert answer["error"]["type"] == "rate_limit_error"
        server.idle()
        assert server.figures()["npr_request_seconds_count"] == 3  # without what was refused
        server.post(COMPLETION, prompt="12")
        error = server.post(COMPLETION, 400, prompt="12", n=4)["error"]
        assert error["param"] == "n"


@contextlib.contextmanager
def asking(server, path=COMPLETION, headers=None, **body):
    """An answer whose first bytes have come; then the client leaves."""
    connection = server.connect()
    try:
        connection.request("POST", path, json.dumps(body), JSON | (headers or {}))
        if body.get("stream"):
            answer = connection.getresponse()
            answer.read(1)
            yield answer
        else:
            while not server.figures()["npr_requests_running"]:
                time.sleep(0.005)
            yield None
    finally:
        connection.close()


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


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answers(stream, capfd):
    with serving() as server:
        slow(server, 0.03)  # so that they would take six seconds
        with asking(server, **LONG, n=3, stream=stream):
            assert server.figures()["npr_answers_unfinished"] == 3
        server.idle(2)
        assert server.figures()['npr_answers_finished_total{reason="aborted"}'] == 3
    assert "Traceback" not in capfd.readouterr().err


def test_a_request_can_be_ended_by_its_id():
    with serving() as server:
        slow(server)
        for name in ("mine/1", "cmpl-mine/1"):
            with asking(server, headers={"X-Request-Id": "mine/1"}, **LONG, stream=True) as answer:
                status, _, told = server.ask("DELETE", f"/v1/requests/{name}")
                assert status == 200 and told["aborted"] == 1
                pieces = pieces_of(b"d" + answer.read())
            assert pieces[-1]["choices"][0]["finish_reason"] == "abort"
            server.idle()
        assert server.ask("DELETE", "/v1/requests/mine")[0] == 404


def test_bodies_that_are_too_large_or_too_slow_are_refused():
    with serving(dataclasses.replace(CONFIG, max_body=1000, header_seconds=0.3)) as server:
        status, _, answer = server.ask("POST", COMPLETION, {"prompt": "1" * 2000})
        assert status == 413 and "1000" in answer["error"]["message"]
        connection = server.connect()
        connection.putrequest("POST", COMPLETION)
        connection.putheader("Content-Length", "100")
        connection.putheader("Content-Type", "application/json")
        connection.endheaders(b'{"prompt"')
        assert connection.getresponse().status == 408
        connection.close()


def _head(path: str, more: str) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: a\r\n{more}\r\n\r\n".encode()


HALVES = {  # what a client sends, and what it goes on with, never to its end
    "headers": (b"GET /health HTTP/1.1\r\nHos", b"x"),
    "headers of a second request": (b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /heal", b"x"),
    "a body that was answered": (
        _head(COMPLETION, "Content-Length: 9999999\r\nContent-Type: application/json"),
        b"x",
    ),
}


@pytest.mark.parametrize("name", HALVES)
def test_a_client_that_never_comes_to_its_end_is_left(name):
    with serving(dataclasses.replace(CONFIG, max_body=1000, header_seconds=0.4)) as server:
        sent, more = HALVES[name]
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(sent)
            begun = time.monotonic()
            with pytest.raises(ConnectionError):
                while time.monotonic() < begun + 5:
                    time.sleep(0.05)
                    connection.sendall(more)
        # A client that takes its time between two requests may stay.
        connection = server.connect()
        for _ in range(2):
            connection.request("GET", "/health")
            assert connection.getresponse().read()
            time.sleep(0.6)
        connection.close()


def test_what_is_no_http_is_told_so_and_never_inside_an_answer(server, caplog):
    chunked = "Transfer-Encoding: chunked\r\nContent-Type: "
    for kind, status in (("application/json", b"400"), ("text/plain", b"415")):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(_head(COMPLETION, chunked + kind))
            raw = connection.recv(9999) if status == b"415" else b""
            connection.sendall(b"no chunk\r\n")
            while got := connection.recv(9999):
                raw += got
        assert raw.startswith(b"HTTP/1.1 " + status) and raw.count(b"HTTP/1.1") == 1
        assert json.loads(raw.split(b"\r\n\r\n")[1])["error"]["message"]
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_when_the_engine_fails_every_request_hears_why_and_health_says_so():
    with serving() as server:
        runner = server.server.engine.engine.runner
        calls = []

        def fail(*arguments):
            calls.append(1)
            time.sleep(0.005)
            if len(calls) > 20:
                raise RuntimeError("the device is gone")
            return steps.decode(*arguments)

        steps = runner._steps
        runner._steps = steps._replace(decode=fail)
        found = []

        def ask(stream):
            status, _, answer = server.ask("POST", COMPLETION, LONG | {"stream": stream})
            found.append((status, answer if isinstance(answer, dict) else pieces_of(answer)))

        threads = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(found) == 6
        for status, answer in found:
            error = answer["error"] if isinstance(answer, dict) else answer[-1]["error"]
            assert status == (503 if isinstance(answer, dict) else 200)
            assert "the device is gone" in error["message"]
        status, _, health = server.ask("GET", "/health")
        assert status == 503 and "the device is gone" in health["status"]
        error = server.post(COMPLETION, 503, prompt="12")["error"]
        assert "the device is gone" in error["message"]
        assert server.ask("GET", "/metrics")[0] == 200


def test_at_shutdown_new_requests_are_refused_and_old_ones_end():
    with serving() as server:
        slow(server, 0.02)
        loop = server.server.engine._loop
        assert loop is not None
        with asking(server, **LONG | {"max_tokens": 200}, stream=True) as short:
            draining = asyncio.run_coroutine_threadsafe(server.server.drain(20), loop)
            while not server.server.draining:
                time.sleep(0.005)
            status, headers, answer = server.ask("POST", COMPLETION, {"prompt": "12"})
            assert status == 503 and headers["retry-after"]
            assert "shutting down" in answer["error"]["message"]
            assert server.ask("GET", "/health")[0] == 503
            pieces = pieces_of(b"d" + short.read())
            assert pieces[-1]["choices"][0]["finish_reason"] == "length"
        draining.result(20)


def test_at_shutdown_what_takes_too_long_is_ended():
    with serving() as server:
        slow(server, 0.05)
        loop = server.server.engine._loop
        assert loop is not None
        with asking(server, **LONG, stream=True) as answer:
            asyncio.run_coroutine_threadsafe(server.server.drain(0.2), loop).result(20)
            pieces = pieces_of(b"d" + answer.read())
            assert pieces[-1]["choices"][0]["finish_reason"] == "abort"


def test_weights_can_be_swapped_while_it_runs():
    norm = bigram.model().params["final_norm"]
    weights = [dict(bigram.model().params, final_norm=norm + i) for i in (1, 2)]

    def reload():
        if not weights:
            raise ValueError("the directory is empty")
        return weights.pop(0)

    with serving(reload=reload) as server:
        for version in range(3):
            body = {"prompt": "12", "max_tokens": 40, "seed": 1}
            assert server.post(COMPLETION, **body)["system_fingerprint"] == f"weights-{version}"
            assert server.ask("GET", "/version")[2]["weights"] == version
            if version < 2:
                assert server.post("/v1/reload")["version"] == version + 1
        error = server.post("/v1/reload", 409)["error"]
        assert "the directory is empty" in error["message"]
        assert server.ask("GET", "/version")[2]["weights"] == 2


def test_who_leaves_while_new_weights_are_waited_for_gives_its_place_back():
    config = dataclasses.replace(CONFIG, max_requests=2)
    with serving(config, reload=lambda: dict(bigram.model().params)) as server:
        slow(server, 0.03)
        with asking(server, **LONG, stream=True):
            reloading = threading.Thread(target=server.post, args=("/v1/reload",))
            reloading.start()
            while not server.server.engine._weights:
                time.sleep(0.01)
            connection = server.connect()
            connection.request("POST", COMPLETION, json.dumps({"prompt": "12"}), JSON)
            while server.figures()["npr_answers_unfinished"] < 2:
                time.sleep(0.01)
            connection.close()
            end = time.monotonic() + 5
            while server.figures()["npr_answers_unfinished"] > 1:
                assert time.monotonic() < end
                time.sleep(0.01)
            assert server.server.engine._weights and server.figures()["npr_requests_running"] == 1
        reloading.join(20)
        server.idle()


def test_a_page_elsewhere_cannot_reload_the_weights():
    config = dataclasses.replace(CONFIG, cors=("http://here",))
    with serving(config, reload=lambda: dict(bigram.model().params)) as server:
        status, _, answer = server.ask("POST", "/v1/reload", b"", {"Origin": "http://elsewhere"})
        assert status == 403 and "origins" in answer["error"]["message"]
        for headers in ({"Origin": "http://here"}, {}):
            assert server.ask("POST", "/v1/reload", b"", headers)[0] == 200


def test_a_model_without_tags_is_served_sequentially_and_says_so():
    with serving(tags=None) as server:
        assert server.ask("GET", "/v1/models")[2]["data"][0]["parallel"] is False
        answer = server.post(COMPLETION, prompt="12", max_tokens=20, seed=1)
        alone = in_process("12", max_tokens=20, seed=1, parallel=False)[0]
        assert answer["choices"][0]["text"] == alone.text
        error = server.post(COMPLETION, 400, prompt="12", parallel=True)["error"]
        assert error["param"] == "parallel" and "sequentially" in error["message"]


def test_pages_of_other_origins_may_ask_only_if_they_are_named():
    headers = {"Origin": "http://elsewhere"}
    with serving() as server:
        assert "access-control-allow-origin" not in server.ask("GET", "/health", None, headers)[1]
    with serving(dataclasses.replace(CONFIG, cors=("http://elsewhere",))) as server:
        _, found, _ = server.ask("GET", "/health", None, headers)
        assert found["access-control-allow-origin"] == "http://elsewhere"


def test_pipelined_requests_are_answered_in_turn(server):
    body = json.dumps({"prompt": "12", "max_tokens": 3}).encode()
    head = f"POST {COMPLETION} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    head = head.encode() + b"Content-Type: application/json\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(3 * (head + body) + b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        raw = b""
        while raw.count(b"HTTP/1.1 200") < 4 or not raw.endswith(b"}"):
            got = connection.recv(65536)
            assert got
            raw += got


# Some of the first two hundred calls, and nightly all of them.
CALLS = dict.fromkeys((*range(1, 201, 18), *range(1, 201)))


@pytest.mark.parametrize("failing", spread(CALLS, 6, 12))
def test_a_failing_device_leaves_no_request_without_an_answer(failing):
    """Whichever call of the device it is, every request ends with a reason."""
    with serving() as server:
        runner, calls = server.server.engine.engine.runner, []

        def counted(step):
            def call(*arguments):
                calls.append(1)
                if len(calls) == failing:
                    raise RuntimeError("the device is gone")
                return step(*arguments)

            return call

        steps = runner._steps
        runner._steps = runner._prompt_steps = steps._replace(
            **{name: counted(getattr(steps, name)) for name in ("prefill", "decode")}
        )
        found = []

        def ask(number):
            body = {"prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": 160}
            body |= {"stream": number % 2 == 0, "temperature": 0}
            found.append(server.ask("POST", COMPLETION, body))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(found) == len(threads)
        failed = server.ask("GET", "/health")[0] == 503
        assert failed == (len(calls) >= failing)
        for status, _, answer in found:
            assert status in ((200, 503) if failed else (200,))
            pieces = [answer] if isinstance(answer, dict) else pieces_of(answer)
            last = pieces[-1]
            over = "error" in last or last["choices"][0]["finish_reason"]
            assert over and (failed or "error" not in last)


def test_the_tokens_of_an_answer_can_be_limited():
    with serving(dataclasses.replace(CONFIG, max_tokens=20)) as server:
        answer = server.post(COMPLETION, prompt="12", max_tokens=20, parallel=False)
        assert answer["usage"]["completion_tokens"] <= 20
        error = server.post(COMPLETION, 400, prompt="12", max_tokens=21)["error"]
        assert error["param"] == "max_tokens" and "20" in error["message"]
        chat = server.post(CHAT, messages=[{"role": "user", "content": "12"}])
        assert chat["usage"]["completion_tokens"] <= 20


class Wire:
    """A transport that is told what happens to it."""

    def __init__(self):
        self.happened = []

    def __getattr__(self, name):
        return lambda *_: self.happened.append(name)

    def get_extra_info(self, name, default=None):
        return default


def test_a_client_that_sends_no_headers_or_reads_nothing_is_let_go():
    config = dataclasses.replace(CONFIG, header_seconds=0.05, stalled_seconds=0.05)

    async def alone(stall: bool) -> list[str]:
        settings = uvicorn.Config(lambda *_: None, log_config=None)
        settings.load()
        state, wire = ServerState(), Wire()
        connection = http_protocol(config)(settings, state, {})
        connection.connection_made(wire)
        if stall:
            connection._late.cancel()
            connection.pause_writing()
        else:
            connection.data_received(b"GET /health HTTP/1.1\r\nHost")
        await asyncio.sleep(0.2)
        return wire.happened

    assert "close" in asyncio.run(alone(stall=False))
    assert "abort" in asyncio.run(alone(stall=True))


def test_a_client_that_reads_again_in_time_is_kept():
    config = dataclasses.replace(CONFIG, header_seconds=9.0, stalled_seconds=0.1)

    async def alone() -> list[str]:
        settings = uvicorn.Config(lambda *_: None, log_config=None)
        settings.load()
        wire = Wire()
        connection = http_protocol(config)(settings, ServerState(), {})
        connection.connection_made(wire)
        for _ in range(4):
            connection.pause_writing()
            await asyncio.sleep(0.05)
            connection.resume_writing()
        await asyncio.sleep(0.2)
        connection.connection_lost(None)
        return wire.happened

    assert "abort" not in asyncio.run(alone())


def test_a_fault_of_the_server_is_told_without_its_inside(monkeypatch, capfd):
    def broken(*_):
        raise KeyError("a secret of the inside")

    with serving() as server:
        monkeypatch.setattr(answering.Answering, "usage", broken)
        monkeypatch.setattr(answering.Choice, "say", broken)
        for stream in (False, True):
            body = {"prompt": "12", "max_tokens": 5, "stream": stream}
            status, _, answer = server.ask("POST", COMPLETION, body)
            assert status == (200 if stream else 500)
            error = pieces_of(answer)[-1]["error"] if stream else answer["error"]
            assert error["type"] == "server_error" and "secret" not in str(error)
    assert capfd.readouterr().err.count("a secret of the inside") >= 2


def test_the_description_promises_what_can_come():
    paths = description()["paths"]
    assert set(paths["/health"]["get"]["responses"]) == {"200", "503"}
    assert set(paths["/v1/models"]["get"]["responses"]) == {"200", "401", "503"}
    needed = {"200", "400", "401", "404", "408", "413", "415", "429", "503"}
    assert set(paths[CHAT]["post"]["responses"]) == needed
