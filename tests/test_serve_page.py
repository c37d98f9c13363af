"""The page of the server in a real browser: what it shows is what the server says.

The server decodes on the fake device; what that cannot say comes from a server of made-up streams.
Screenshots go to the folder NPR_ARTIFACTS, or to pytest's own.
"""

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
import report_toy as toy
import uvicorn
from serve_toy import CONFIG, Digits, serving
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from webdriver import browser

from npr_jax.decode import SamplingParams
from npr_jax.evaluate.traces import read_trace
from npr_jax.report.lines import sections
from npr_jax.serve.page import page as answer_page

CHAT = "/v1/chat/completions"
# The fake device goes on with two blocks and an end; with nested blocks that are cut off.
FLAT, NESTED = "1613", "16"
LONG = {"max_tokens": 1000, "sequential": True}
ENDLESS = dataclasses.replace(CONFIG, sampling=SamplingParams(ignore_eos=True))

SET = """for (const [name, value] of Object.entries(arguments[0])) {
  const field = document.getElementById('ask').elements[name];
  if (field.type === 'checkbox') field.checked = value; else field.value = value;
}"""
ENDED = (
    "return document.querySelectorAll('[data-state=waiting], [data-state=running]').length === 0"
)
STATES = "return [...document.querySelectorAll('.answer')].map(a => a.dataset.state)"
TOLD = "return document.querySelector('.state').textContent"
FIGURES = """const cells = [...document.querySelectorAll(arguments[0] + ' .figures div')];
return Object.fromEntries(cells.map(e => [e.firstChild.textContent, e.lastChild.textContent]))"""
# The own text of every line of the newest answer, by its name.
LINES = """const found = {};
const runs = (place) => [...place.children].filter(e => e.className === 'run')
  .map(e => e.textContent);
found.trunk = runs(document.querySelector('.live'));
for (const e of document.querySelector('.live').querySelectorAll('.branch'))
  found[e.ariaLabel] = runs(e);
return found"""
CRITICAL = """return [...document.querySelector('.live').querySelectorAll('.critical')]
  .filter(e => e.checkVisibility()).map(e => e.closest('.branch').ariaLabel)"""


pytestmark = pytest.mark.usefixtures("plans_without_numbers")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running
        running.idle()


def visit(chromium, port: int) -> None:
    """Opens the page anew, and waits until it knows what is served."""
    chromium.window(1280, 900)
    chromium.run("location.href = arguments[0]", f"http://127.0.0.1:{port}/")
    chromium.until("return document.getElementById('model')?.textContent")
    chromium.complaints()


@pytest.fixture
def opened(chromium, server):
    visit(chromium, server.port)
    yield chromium
    assert chromium.complaints() == []


def ask(chromium, question: str, **fields) -> None:
    """Fills in the form and sends it."""
    chromium.run(SET, {"question": question} | fields)
    chromium.click(".send")


def answered(chromium, question: str, **fields) -> None:
    """Asks, and waits for the end."""
    ask(chromium, question, **fields)
    chromium.until(ENDED)


def picture(chromium, tmp_path, name: str) -> None:
    folder = Path(os.environ.get("NPR_ARTIFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    chromium.screenshot(folder / name)
    assert (folder / name).stat().st_size > 10_000


def expected(server, question: str, **body) -> tuple[dict, dict]:
    """(trace, usage) of the same answer, asked for without the page."""
    turns = [{"role": "user", "content": question}]
    options = {"stream_branches": True, "stream_options": {"include_usage": True}}
    pieces = server.stream(CHAT, messages=turns, **options, **body)
    return pieces[-2]["choices"][0]["branch"]["trace"], pieces[-1]["usage"]


def lines_of(trace: dict) -> tuple[dict[str, list[str]], list[str]]:
    """(texts of the runs of every line that are not empty, branches on a critical path)."""
    read = read_trace(json.dumps(trace))
    tree, found, critical = read.layout, {}, []

    def walk(span, depth, name, path, counts):
        found[name], blocks = [], 0
        for run, branches in sections(tree, span, depth):
            if run[0] < run[1]:
                found[name].append("".join(read.pieces[slice(*run)]))
            ends = [max(tree.positions[slice(*branch)]) for branch in branches]
            blocks += bool(branches)
            for number, branch in enumerate(branches):
                label = f"{path}{blocks}.{number + 1}"
                longest = counts and ends[number] == max(ends)
                if longest:
                    critical.append(f"branch {label}")
                walk(branch, depth + 1, f"branch {label}", f"{label} › ", longest)

    walk((read.prompt_len, len(tree)), 0, "trunk", "", True)
    return found, critical


def test_the_policy_allows_what_stands_in_the_page_and_nothing_else():
    answer = answer_page()
    text, policy = answer.body.decode(), answer.headers["content-security-policy"]
    for name in ("style", "script"):
        (part,) = re.findall(rf"<{name}[^>]*>(.*?)</{name}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    body = text[text.index("<body>") : text.index("<script")]
    assert not re.search(r"\son\w+=|\sstyle=", body)
    for own in ('href="openapi.json"', 'href="metrics"'):
        assert own in text
        text = text.replace(own, "")
    icon = re.compile(r'href="data:[^"]*"')
    assert icon.search(text) and not toy.fetches(icon.sub("", text))


@pytest.mark.parametrize("question", [FLAT, NESTED])
def test_what_is_typed_is_asked_and_its_tree_is_the_trace(opened, server, tmp_path, question):
    trace, usage = expected(server, question, seed=1, max_tokens=160)
    texts, critical = lines_of(trace)
    assert len(texts) > 4 and any("›" in name for name in texts) == (question == NESTED)
    opened.run(SET, {"seed": "1", "max_tokens": "160"})
    opened.run("document.getElementById('ask').question.focus()")
    opened.press(*question)
    send_by_keys(opened)
    opened.until(ENDED)
    assert opened.run("return document.querySelector('.asked').textContent") == question
    assert opened.run(LINES) == texts
    assert opened.run(CRITICAL) == critical and critical
    figures = opened.run(FIGURES, ".answer")
    tokens, path = usage["completion_tokens"], usage["critical_path"]
    assert figures["tokens"] == f"{tokens}" and figures["critical path"] == f"{path}"
    assert figures["speed-up"] == f"{tokens / path:.2f}×"
    assert figures["branches"] == f"{len(texts) - 1}"
    assert re.fullmatch(r"[\d,]+", figures["tokens/s"])
    assert f"seed 1 · prompt of {usage['prompt_tokens']} tokens" in opened.run(
        "return document.querySelector('.settings').textContent"
    )
    # Columns of a fork stand side by side; the trunk goes on below them.
    for fork in opened.run(
        """return [...document.querySelectorAll('.fork')].map(f => [...f.firstChild.children]
           .map(b => b.getBoundingClientRect()).map(r => [r.left, r.top]))"""
    ):
        assert len({round(top) for _, top in fork}) == 1 and len({x for x, _ in fork}) == len(fork)
    picture(opened, tmp_path, f"page-{question}.png")


def send_by_keys(chromium) -> None:
    """Ctrl and Enter."""
    control, enter = "\ue009", "\ue007"
    keys = [("keyDown", control), ("keyDown", enter), ("keyUp", enter), ("keyUp", control)]
    actions = [{"type": kind, "value": value} for kind, value in keys]
    source = {"type": "key", "id": "keyboard", "actions": actions}
    chromium._send("POST", "/actions", {"actions": [source]})


def test_tokens_are_coloured_and_say_what_they_are(opened, server):
    trace, _ = expected(server, FLAT, seed=1, max_tokens=160)
    answered(opened, FLAT, seed="1", max_tokens="160")
    told = opened.run(
        "return [...document.querySelectorAll('.live .t')].map(e => [e.className, e.title])"
    )
    read = read_trace(json.dumps(trace))
    assert len(told) == len(read.layout) - read.prompt_len
    for at, (style, title) in enumerate(told, read.prompt_len):
        facts = f"id {read.token_ids[at]} · position {read.layout.positions[at]} · "
        if read.forced[at]:
            assert (style, title) == ("t forced", facts + "written by the engine")
        else:  # the fake device says -0.5 of all
            assert (style, title) == ("t p1", facts + "log-prob -0.50 (60.7%)")


def test_the_finished_answer_opens_in_the_viewer_of_the_report(opened, server):
    answered(opened, NESTED, seed="1", max_tokens="160")
    trace, usage = expected(server, NESTED, seed=1, max_tokens=160)
    opened.click(".answer .open")
    opened.until("return document.querySelector('dialog .tree .t')")
    figures = opened.run(FIGURES, "dialog")
    assert figures["critical path"] == f"{usage['critical_path']}"
    pieces = "".join(trace["pieces"][trace["prompt_len"] :])
    text = "[...document.querySelectorAll('dialog .chunk')].map(e => e.textContent).join('')"
    assert opened.run(f"return {text}") == pieces
    opened.run("document.querySelector('dialog .tree').focus()")
    opened.press("Right", "Right")
    at = trace["prompt_len"] + 2
    assert f"id {trace['token_ids'][at]}" in opened.run(
        "return document.querySelector('dialog .inspector').innerText.replace(/\\s+/g, ' ')"
    )
    opened.press("Escape")
    opened.until("return !document.querySelector('dialog').open")
    assert opened.run("return document.querySelector('dialog .tree')") is None
    assert opened.run("return document.activeElement.className") == "open"


def test_nothing_is_fetched_from_anywhere_else_and_nothing_else_may_run(chromium, server):
    visit(chromium, server.port)
    answered(chromium, FLAT, seed="1", max_tokens="60")
    fetched = chromium.run("return performance.getEntriesByType('resource').map(e => e.name)")
    origin = f"http://127.0.0.1:{server.port}/"
    assert {name.removeprefix(origin) for name in fetched} == {
        "v1/models",
        "tokenizer_info",
        CHAT[1:],
    }
    assert chromium.complaints() == []
    elsewhere = f"http://localhost:{server.port}/health"
    chromium.run(
        """fetch(arguments[0]).then(() => window.got = 'in', () => window.got = 'blocked');
           const made = document.createElement('script'), image = document.createElement('img');
           window.refused = [() => made.text = 'window.ran = 1',
             () => image.setAttribute('onerror', 'window.ran = 1'),
             () => document.body.innerHTML = '<b>x</b>'].map((act) => {
               try { act(); } catch (error) { return error.name; } });
           made.append('window.ran = 1'); image.src = arguments[0];
           document.body.append(made, image);""",
        elsewhere,
    )
    assert chromium.until("return window.got") == "blocked"
    assert chromium.run("return window.refused") == ["TypeError"] * 3
    assert chromium.run("return window.ran ?? null") is None


def test_stop_ends_the_request_and_shows_what_there_was(chromium):
    with serving(ENDLESS) as server:
        server.slow()
        visit(chromium, server.port)
        ask(chromium, "12", **LONG)
        chromium.until("return document.querySelectorAll('.live .t').length > 20")
        chromium.run("window.first = document.querySelector('.live .t')")
        assert server.figures()["npr_answers_unfinished"] == 1
        chromium.run("[...document.querySelectorAll('.buttons button')][1].focus()")
        chromium.press("Enter")
        chromium.until(ENDED)
        server.idle()
        assert chromium.run(STATES) == ["stopped"] and chromium.run("return first.isConnected")
        assert server.figures()['npr_answers_finished_total{reason="aborted"}'] == 1
        # The focus is where one goes on.
        assert chromium.run("return document.activeElement.textContent") == "View answer"
        chromium.press("Enter")
        chromium.until("return document.querySelector('dialog .tree .t')")
        assert "aborted" in chromium.run("return document.querySelector('dialog').innerText")
        assert chromium.complaints() == []


def test_closing_the_page_ends_its_requests(chromium):
    with serving(ENDLESS) as server:
        server.slow(0.03)
        visit(chromium, server.port)
        ask(chromium, "12", **LONG)
        chromium.until("return document.querySelectorAll('.live .t').length > 5")
        chromium.run("location.href = 'about:blank'")
        server.idle(3)
        assert server.figures()['npr_answers_finished_total{reason="aborted"}'] == 1


@pytest.mark.slow
def test_several_requests_at_a_time_and_a_bounded_number(chromium, tmp_path):
    with serving(ENDLESS) as server:
        server.slow(0.03)
        visit(chromium, server.port)
        ask(chromium, "12", **LONG)
        ask(chromium, NESTED, seed="1", max_tokens="160", sequential=False)
        chromium.until(
            """const all = [...document.querySelectorAll('.answer')];
               return all.length === 2 && all.every(a => a.querySelectorAll('.t').length > 9)"""
        )
        assert server.figures()["npr_answers_unfinished"] == 2
        picture(chromium, tmp_path, "page-growing.png")
        # The newest stands first, and ends alone.
        chromium.until("return document.querySelector('.answer').dataset.state !== 'running'")
        assert chromium.run(STATES)[1] == "running"
        trace, _ = expected(server, NESTED, seed=1, max_tokens=160)
        assert chromium.run(LINES) == lines_of(trace)[0]
        picture(chromium, tmp_path, "page-two.png")
        for _ in range(4):
            ask(chromium, "12", **LONG, seed="")
        assert server.figures()["npr_answers_unfinished"] == 5
        ask(chromium, "12")
        assert "5 answers are being decoded" in chromium.run(
            "return document.getElementById('hint').textContent"
        )
        assert len(chromium.run(STATES)) == 6
        chromium.run(
            """for (const button of document.querySelectorAll('.buttons button'))
                 if (button.textContent === 'Stop' && !button.hidden) button.click()"""
        )
        chromium.until(ENDED)
        server.idle()
        assert chromium.run(STATES).count("stopped") == 5
        for _ in range(18):  # in all more than it keeps
            answered(chromium, "12", max_tokens="1")
        assert len(chromium.run(STATES)) == 20
        names = chromium.run(
            "return [...document.querySelectorAll('.answer')].map(a => a.ariaLabel)"
        )
        assert names == [f"Answer {i}" for i in range(24, 4, -1)]
        assert chromium.complaints() == []


class Hostile(Digits):
    """A text that a careless page would take for HTML, for every token."""

    TEXT = "<img src=x onerror='window.ran=1'></div><script>window.ran=1</script>&amp;\u202e"

    def decode(self, ids, clean_up_tokenization_spaces=True) -> str:
        return "".join(f"{token:02d}{self.TEXT}" for token in ids)


def test_text_of_a_model_is_text(chromium):
    with serving(tokenizer=Hostile()) as server:
        visit(chromium, server.port)
        answered(chromium, FLAT + "<b>y</b>", seed="1", max_tokens="160")
        text = chromium.run("return document.querySelector('.live').textContent")
        assert Hostile.TEXT.replace("\u202e", "⟨U+202E⟩") in text
        assert (
            chromium.run("return document.querySelectorAll('main :is(img, script, b)').length") == 0
        )
        assert "<b>y</b>" in chromium.run("return document.querySelector('.asked').textContent")
        chromium.click(".answer .open")
        chromium.until("return document.querySelector('dialog .chunk')")
        assert (
            chromium.run("return document.querySelectorAll('dialog :is(img, script)').length") == 0
        )
        assert chromium.run("return window.ran ?? null") is None
        assert chromium.complaints() == []


def test_a_narrow_window_has_all_of_it(opened, tmp_path):
    opened.window(480, 900)
    answered(opened, NESTED, seed="1", max_tokens="160")
    overflow = """const limit = document.documentElement.clientWidth, out = [];
      if (document.documentElement.scrollWidth > limit) out.push('page');
      for (const e of document.querySelectorAll(arguments[0])) {
        if (e.closest('.fork, .chunk, option')) continue;
        if (e.getBoundingClientRect().right > limit + 1) out.push(e.className || e.tagName);
      } return out"""
    assert opened.run(overflow, "body *") == []
    assert opened.run(
        "return [...document.querySelectorAll('.fork')].some(f => f.scrollWidth > f.clientWidth)"
    )
    opened.run("document.querySelector('.answer').scrollIntoView()")
    picture(opened, tmp_path, "page-narrow.png")
    opened.window(480, 900, dark=True)
    opened.click(".answer .open")
    opened.until("return document.querySelector('dialog .tree .t')")
    assert opened.run(overflow, "dialog *") == []
    picture(opened, tmp_path, "page-viewer-narrow.png")


def test_a_cut_answer_says_so_and_its_columns_stay_open(opened, server):
    answered(opened, NESTED, seed="1", max_tokens="160")
    assert opened.run(STATES) == ["cut"]
    assert opened.run(TOLD).startswith("cut off by a limit: branch_length")
    trace, _ = expected(server, NESTED, seed=1, max_tokens=160)
    read = read_trace(json.dumps(trace))
    cut = [block for block in read.blocks if block.branches and block.join == len(read.layout)]
    assert cut and opened.run("return document.querySelectorAll('.lanes.open').length") == len(cut)
    answered(opened, FLAT, seed="1", max_tokens="5")
    assert opened.run(TOLD) == "cut off by a limit: max tokens"


def test_the_switch_asks_for_one_token_after_the_other(opened, server):
    answered(opened, FLAT, seed="1", max_tokens="80", sequential=True)
    trace, _ = expected(server, FLAT, seed=1, max_tokens=80, parallel=False)
    assert opened.run(LINES) == lines_of(trace)[0]
    assert opened.run("return document.querySelectorAll('.branch').length") == 0
    assert opened.run(FIGURES, ".answer")["speed-up"] == "1.00×"
    opened.run("[...document.querySelectorAll('.answer button')][2].click()")  # again
    opened.until(
        "return document.querySelectorAll('[data-state=done], [data-state=cut]').length == 2"
    )
    assert opened.run(LINES) == lines_of(trace)[0]


def test_a_model_without_tags_is_asked_sequentially(chromium):
    with serving(tags=None) as server:
        visit(chromium, server.port)
        field = (
            "const f = document.getElementById('ask').sequential; return [f.checked, f.disabled]"
        )
        chromium.until(f"{field}.every(Boolean)")
        assert "no tags" in chromium.run("return document.getElementById('tags').textContent")
        answered(chromium, "12", max_tokens="20")
        assert chromium.run(STATES)[0] in ("done", "cut")


def test_refusals_are_shown_with_their_words(chromium):
    with serving(dataclasses.replace(ENDLESS, max_requests=1)) as server:
        server.slow()
        visit(chromium, server.port)
        ask(chromium, "12" * 2000, max_tokens="")
        chromium.until(ENDED)
        assert chromium.run(STATES) == ["failed"]
        assert chromium.run(TOLD).startswith("400: This model's maximum context length")
        ask(chromium, "12", **LONG)
        chromium.until("return document.querySelector('.live .t')")
        ask(chromium, "13")
        chromium.until("return document.querySelector('.answer').dataset.state === 'failed'")
        assert re.match(r"429: .*try again later.* \(Retry after 1 s.\)", chromium.run(TOLD))
    # The server is gone: the answer that grew keeps its tokens, a new one fails at once.
    chromium.until(ENDED)
    assert chromium.run("return document.querySelectorAll('.live .t').length") > 0
    answered(chromium, "12")
    assert chromium.run(TOLD) == "The server cannot be reached."


def test_a_key_is_asked_for_where_one_is_needed(chromium):
    with serving(key="secret") as server:
        visit(chromium, server.port)
        shown = "return !document.getElementById('key').hidden"
        assert chromium.run(shown) and "401" in chromium.run(
            "return document.getElementById('model').textContent"
        )
        for key, state in (("wrong", "failed"), ("secret", "cut")):
            chromium.run("document.querySelector('#key input').value = arguments[0]", key)
            chromium.click("#key button")
            answered(chromium, FLAT, max_tokens="5")
            assert chromium.run(STATES)[0] == state
        assert not chromium.run(shown)
        assert chromium.run("return [sessionStorage.length, localStorage.length]") == [1, 0]
        assert "toy" in chromium.run("return document.getElementById('model').textContent")


def chunk(event: dict | None, **choice) -> bytes:
    """A piece of a made-up stream."""
    made = {"index": 0, "delta": {}, "finish_reason": None} | choice
    piece = {"choices": [made | ({} if event is None else {"branch": event})]}
    return f"data: {json.dumps(piece)}\n\n".encode()


def tokens(count: int, position: int = 3, path=()) -> bytes:
    """Tokens of a line; every eighth ends a line of text."""
    made = [
        {"id": i, "text": "\n" if i % 8 == 7 else f" w{i}", "logprob": -i % 5, "forced": False}
        for i in range(count)
    ]
    return chunk({"event": "tokens", "branch": path, "position": position, "tokens": made})


@contextlib.contextmanager
def made_up(*parts: bytes, hangs: bool = False):
    """Where there is a server whose every answer is these bytes; `hangs`: and then nothing, not
    even an end."""

    async def models(_):
        return JSONResponse({"data": [{"id": "made up", "parallel": True, "max_model_len": 9}]})

    async def info(_):
        return JSONResponse({"chat_template": "yes"})

    async def chat(_):
        async def say():
            for part in parts:
                yield part
            if hangs:
                await asyncio.sleep(60)

        headers = {"x-request-id": "made/up"}
        return StreamingResponse(say(), media_type="text/event-stream", headers=headers)

    routes = [
        Route("/", lambda _: answer_page()),
        Route("/v1/models", models),
        Route("/tokenizer_info", info),
        Route(CHAT, chat, methods=["POST"]),
    ]
    process = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), port=0, log_level="error"))
    thread = threading.Thread(target=process.run, daemon=True)
    thread.start()
    while not process.started:
        time.sleep(0.005)
    try:
        yield process.servers[0].sockets[0].getsockname()[1]
    finally:
        process.should_exit = True
        thread.join(20)


FAILED = b'data: {"error": {"message": "The answer failed: <i>out</i> of pages."}}\n\n'
BAD = {
    "an error": ([tokens(3), FAILED], "The answer failed: <i>out</i> of pages."),
    "no end": ([tokens(3)], "The connection broke off before the end of the answer."),
    "no finish": ([tokens(3), b"data: [DONE]\n\n"], "The answer came without its end."),
    "no JSON": ([tokens(3), b"data: {]\n\n"], "What the server sent cannot be read: "),
    "no choices": ([tokens(3), b"data: {}\n\n"], "What the server sent cannot be read: "),
    "no branch": ([tokens(3), tokens(3, 6, [[0, 1]])], "cannot be read: no branch [[0,1]]"),
    "malformed": (
        [
            b": a comment\n\n",
            tokens(3),
            chunk({"event": "finish"}, finish_reason="stop", finish_detail="malformed: no <x>"),
            b"data: [DONE]\n\n",
        ],
        "ended by its format: malformed: no <x>",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_stream_that_goes_wrong_says_so_and_keeps_its_tokens(chromium, name):
    parts, told = BAD[name]
    with made_up(*parts) as port:
        visit(chromium, port)
        answered(chromium, "why?")
        assert told in chromium.run(TOLD)
        assert chromium.run(STATES) == ["cut" if name == "malformed" else "failed"]
        assert chromium.run(LINES) == {"trunk": [" w0 w1 w2"]}
        # There is nothing to view of any of them.
        assert chromium.run("return document.querySelector('.answer .open').hidden")


def test_a_server_that_does_not_stop_is_left_at_the_second_click(chromium):
    with made_up(tokens(3), hangs=True) as port:
        visit(chromium, port)
        ask(chromium, "why?")
        chromium.until("return document.querySelector('.live .t')")
        chromium.click(".buttons button:nth-child(2)")
        assert chromium.run(TOLD) == "stopping" and chromium.run(STATES) == ["running"]
        chromium.click(".buttons button:nth-child(2)")
        chromium.until(ENDED)
        assert chromium.run(TOLD) == "stopped"


def test_thousands_of_tokens_are_appended(chromium):
    """In pieces of eight; half of them in columns, half of these in nested ones."""

    def fork(path, position):
        return chunk({"event": "fork", "branch": path, "position": position, "branches": 2})

    trunk = [tokens(8, 3 + 8 * i) for i in range(1000)]
    columns = [tokens(8, 8003 + 8 * i, [[0, j]]) for i in range(250) for j in (0, 1)]
    nested = [tokens(8, 10003 + 8 * i, [[0, 1], [0, j]]) for i in range(250) for j in (0, 1)]
    joins = [chunk({"event": "join", "branch": path, "position": 12003}) for path in ([[0, 1]], [])]
    end = [tokens(8, 12003), chunk({"event": "finish"}, finish_reason="stop"), b"data: [DONE]\n\n"]
    parts = [*trunk, fork([], 8003), *columns, fork([[0, 1]], 10003), *nested, *joins, *end]
    with made_up(*parts) as port:
        visit(chromium, port)
        begun = time.monotonic()
        answered(chromium, "long?")
        taken = time.monotonic() - begun
        assert chromium.run("return document.querySelectorAll('.live .t').length") == 16008
        assert chromium.run("return document.querySelectorAll('.branch').length") == 4
        figures = chromium.run(FIGURES, ".answer")
        assert figures["tokens"] == "16,008" and figures["critical path"] == "12,008"
        sizes = "[...document.querySelectorAll('.chunk')].map(c => c.childNodes.length)"
        assert max(chromium.run(f"return {sizes}")) < 300
        # Its end is in sight.
        assert chromium.run(
            "const p = document.querySelector('.live');"
            "return p.scrollHeight - p.scrollTop - p.clientHeight < 2"
        )
        assert taken < 15, taken
