"""The format checks: one broken rule at a time, and the golden cases."""

import pytest
from conftest import read_golden, shared_path

from npr_jax.tree import TAG_NAMES, TagIds, parse
from npr_jax.tree.format import check_block, check_format

WORDS = [*TAG_NAMES, "\n", "1", "2", "3", ":", "x", " ", "\\boxed{", "{", "}", "<eos>"]


def encode(text):
    ids = []
    while text:
        word = max((w for w in WORDS if text.startswith(w)), key=len)
        ids.append(WORDS.index(word))
        text = text[len(word) :]
    return ids


def decode(ids):
    return "".join(WORDS[i] for i in ids)


TAGS = TagIds(*range(8), whitespace=frozenset({8, 14}), decode=decode)
GOOD = (
    "<guideline>\n<plan>1:x</plan>\n<plan>2: x</plan>\n</guideline>\n<step>\n1:x\n</step>\n<step>\n"
    "2:x\n</step>\n<takeaway>\nx\n</takeaway>\n\\boxed{3}<eos>"
)
NESTED = GOOD.replace("1:x\n", "1:x\n" + GOOD[: GOOD.index("\\")])


def kinds(text, **limits):
    return [
        violation.kind for violation in check_format(encode("x<step>" + text), 2, TAGS, **limits)
    ]


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("<plan>1:x", "<plan>2:x", "plan_number"),
        ("<plan>1:x", "<plan>x", "plan_number"),
        ("<plan>1:x", "<plan>1: ", "empty_plan"),
        ("<step>\n2:x", "<step>\n1:x", "step_number"),
        ("<step>\n2:x", "<step>\n2:", "empty_step"),
        ("<takeaway>\nx", "<takeaway>\n", "empty_takeaway"),
        ("<guideline>", "x<guideline>", "stray_text"),
        ("\\boxed{3}", "3", "no_boxed"),
        ("\\boxed{3}", "\\boxed{3", "no_boxed"),
        ("\\boxed{3}", "\\boxed{ }", "empty_boxed"),
        ("\\boxed{3}", "\\boxed{{}}", "empty_boxed"),
        ("\\boxed{3}", "\\boxed{3}\\boxed{3}", "many_boxed"),
        ("</step>", "", "tree"),
        ("</guideline>\n", "</guideline>x\n", "tree"),
    ],
)
def test_one_broken_rule_is_named(old, new, kind):
    assert kinds(GOOD) == []
    assert kinds(GOOD.replace(old, new, 1)) == [kind]


def test_text_between_blocks_is_stray_and_after_the_last_is_not():
    twice = GOOD[: GOOD.index("\\")] + "{}" + GOOD
    assert kinds(twice.replace("{}", "")) == []
    assert kinds(twice.replace("{}", "x")) == ["stray_text"]
    assert kinds(GOOD.replace("\\boxed", "x: \\boxed")) == []
    # A box in an earlier part does not count as the answer.
    assert kinds(GOOD.replace("2:x", "2:\\boxed{1}")) == []


def test_limits():
    assert kinds(GOOD, max_branches=1) == ["too_many_plans"]
    assert kinds(NESTED) == ["tree"]
    assert kinds(NESTED, max_depth=2) == []
    assert kinds("\\boxed{3}") == ["no_block"]


def test_check_block_names_the_first_broken_rule():
    ids = encode(GOOD)
    block = parse(ids, 0, TAGS).blocks[0]
    assert check_block(ids, block, TAGS, 2) is None
    assert check_block(ids, block, TAGS, 1).reason == "2 plans, at most 1"


def test_golden():
    """The independent check of the golden file; it has a minimum length that we do not ask for."""
    cases = read_golden("format_reward")["cases"]
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_path("qwen3_tokenizer"))
    tokenizer.add_tokens(list(TAG_NAMES), special_tokens=True)
    tags = TagIds.from_tokenizer(tokenizer)
    wrong = []
    for case in cases:
        ids = tokenizer.encode(case["text"], add_special_tokens=False)
        found = {v.kind for v in check_format(ids, 0, tags, max_branches=50)}
        found -= {"plan_number", "step_number"}  # not among the golden rules
        expected = [v for v in case["intended_violations"] if not v.startswith("SHORT_")]
        if bool(found) != bool(expected) and not (found and case["intended_violations"]):
            wrong.append((case["id"], case["kind"], case["intended_violations"], found))
    assert wrong == []
