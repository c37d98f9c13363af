"""The order of a stream: whatever the order in time, the pieces are the text, depth first."""

import bigram
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_jax.decode import Event
from npr_jax.serve.order import Order, Piece, Reasoning

TAGS, END = bigram.TAGS, 2


def lines(depth: int):
    """A line: texts, and forks into lines; a branch ends with its tag."""
    words = st.text("xyz ", max_size=3).map(lambda text: (9, text))
    if not depth:
        return st.lists(words, max_size=4)
    forks = st.lists(lines(depth - 1), min_size=1, max_size=3)
    return st.lists(st.one_of(words, words, forks), max_size=4)


def told(line, path=(), start=10):
    """Events of a line in its own order, its text depth first, and the position after it: tokens
    of a fork's branches as lists of their own, to be told in any order."""
    events, text, block, position = [], "", 0, start
    for item in line:
        if isinstance(item, tuple):
            events.append(("token", path, item, position))
            text, position = text + item[1], position + 1
            continue
        branches = [
            told([*branch, (TAGS.step_close, "/")], (*path, (block, number)), position)
            for number, branch in enumerate(item)
        ]
        events.append(("fork", path, len(item), [some for some, _, _ in branches]))
        text += "".join(said for _, said, _ in branches)
        position = max(after for _, _, after in branches)
        events.append(("join", path, None, position))
        block += 1
    return events, text, position


@settings(max_examples=examples(200), deadline=None)
@given(line=lines(2), data=st.data())
def test_pieces_are_the_text_in_whatever_order_the_branches_grow(line, data):
    events, text, _ = told(line)
    order, said, streams = Order(10, frozenset({END}), TAGS), "", [(None, list(events))]
    open_branches: dict[int, int] = {}  # of a stream that waits, by its place

    while streams:
        ready = [i for i, (_, some) in enumerate(streams) if not open_branches.get(id(some))]
        at = data.draw(st.sampled_from(ready))
        parent, some = streams[at]
        if not some:
            streams.pop(at)
            if parent is not None:
                open_branches[id(parent)] -= 1
            continue
        kind, path, what, more = some.pop(0)
        if kind == "token":
            assert order.position(path) == more
            order.hear(Event("token", 0, path, token_id=what[0], logp=0.0, text=what[1]))
        elif kind == "fork":
            order.hear(Event("fork", 0, path, branches=what))
            open_branches[id(some)] = len(more)
            streams += [(some, list(branch)) for branch in more]
        else:
            order.hear(Event("join", 0, path))
            assert order.position(path) == more
        said += "".join(piece.text for piece in order.take())
        assert text.startswith(said)
    order.hear(Event("finish", 0))
    assert said + "".join(piece.text for piece in order.take()) == text


def test_an_end_is_no_text_unless_something_follows_it():
    order = Order(5, frozenset({END}), TAGS)
    order.hear(Event("fork", 0, branches=2))
    for number, token in ((0, END), (1, 9), (1, END)):
        order.hear(Event("token", 0, ((0, number),), token_id=token, logp=0.0, text=f"<{token}>"))
    assert order.take() == [Piece("", order._lines[(0, 0),].items[0])]  # the second is held back
    order.hear(Event("finish", 0))
    assert [piece.text for piece in order.take()] == ["<2><9>", ""]


def parts(*pieces: tuple[int, str]) -> tuple[str, str]:
    """What is told apart of tokens and their texts."""
    apart = Reasoning(TAGS)
    found = [apart.add(Piece(text, Event("token", 0, token_id=token))) for token, text in pieces]
    found.append(apart.flush(""))
    reasoning, said = ("".join(some) for some in zip(*found, strict=True))
    return reasoning, said


def test_blanks_beside_a_block_are_the_blocks():
    go, tc = TAGS.guideline_open, TAGS.takeaway_close
    assert parts((9, "a b "), (9, "\n c ")) == ("", "a b \n c ")
    assert parts(
        (3, "\n"), (go, "<g>"), (9, " x "), (tc, "</t>"), (3, "\n"), (9, " a"), (9, " b ")
    ) == (
        "\n<g> x </t>\n ",
        "a b ",
    )
    twice = parts((go, "<g>"), (tc, "</t>"), (3, "\n\n"), (go, "<g>"), (tc, "</t>"), (9, "\na"))
    assert twice == ("<g></t>\n\n<g></t>\n", "a")
    assert parts((9, "a "), (go, "<g>"), (tc, "</t>"), (9, " b")) == (" <g></t> ", "ab")


def test_blocks_inside_a_block_belong_to_it():
    go, tc = TAGS.guideline_open, TAGS.takeaway_close
    nested = parts((go, "<"), (go, "<"), (tc, ">"), (9, "x"), (tc, ">"), (9, "y"))
    assert nested == ("<<>x>", "y")
