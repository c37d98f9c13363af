"""Problems from files, prompts from problems, orders and seeds that can be gone on with."""

import json

import jax
import pytest
import transformers
from conftest import shared_path
from train_toy import tiny, write_problems

from npr_jax.base.distributed import mine
from npr_jax.base.seeds import derive_seeds
from npr_jax.data.prepare import prepare
from npr_jax.data.problems import Problem, read_problems, shuffled
from npr_jax.data.prompts import INSTRUCTION, prompt_ids
from npr_jax.train.rl import Feed
from npr_jax.train.rollout import encode_problems


def test_problems_are_read_and_bad_lines_named(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text(
        '{"problem": "1+1?", "answer": 2, "more": 1}\n\n{"problem": "x", "answer": "y"}'
    )
    assert read_problems(path) == [Problem("1+1?", "2"), Problem("x", "y")]
    for line, reason in (
        ('{"problem": "x"', "not valid JSON"),
        ('{"problem": "x"}', '"answer" is None'),
        ('{"problem": "", "answer": "1"}', "\"problem\" is ''"),
        ('{"problem": "x", "answer": true}', '"answer" is True'),
        ("[1]", "is no object"),
        ('{"problem": "\\ud800", "answer": "1"}', "not UTF-8"),
        ('{"problem": "\xff", "answer": "1"}', "not UTF-8"),
    ):
        path.write_text('{"problem": "x", "answer": "y"}\n\n' + line, encoding="latin-1")
        with pytest.raises(ValueError, match=f"problems.jsonl:3: .*{reason}.*npr-jax data prepare"):
            read_problems(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no problems"):
        read_problems(path)
    with pytest.raises(FileNotFoundError):
        read_problems(tmp_path / "none.jsonl")


def test_a_prepared_directory_reads_as_its_source(tmp_path):
    path = tmp_path / "problems.jsonl"
    write_problems(path, 300)
    prepare("jsonl", path, tmp_path / "out")
    assert read_problems(tmp_path / "out") == read_problems(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is a directory without .*npr-jax data prepare"):
        read_problems(tmp_path / "empty")


def test_order_covers_each_epoch_and_is_shuffled_anew():
    order = shuffled(50, 3)
    first, second = ([int(order[i + 50 * e]) for i in range(50)] for e in range(2))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert [int(shuffled(50, 3)[i]) for i in range(50, 100)] == second  # any index, any time
    assert [int(shuffled(50, 4)[i]) for i in range(50)] != first
    assert [int(shuffled(50, 3, 1)[i]) for i in range(50)] != first  # the next stage's


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_the_shares_of_the_processes_are_the_batch(count, monkeypatch):
    order, first, num = shuffled(50, 3), 40, 16  # across the end of an epoch
    batch = [int(order[first + i]) for i in range(num)]
    shares = []
    for index in range(count):
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        shares.append(mine(batch))
    assert sorted(i for part in shares for i in part) == sorted(batch)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_saved_position_goes_on_where_it_stopped():
    problems = [Problem(f"p{i}", str(i)) for i in range(7)]
    feed = Feed(problems, [[i] for i in range(7)], 0, 1)
    taken = [feed.take(3) for _ in range(6)]
    for done in range(6):
        again = Feed(problems, [[i] for i in range(7)], 0, 1)
        again.position = done * 3
        assert [again.take(3) for _ in range(done, 6)] == taken[done:]


def test_grains_own_iterator_over_the_order_goes_on_too():
    iterator = iter(shuffled(50, 3).to_iter_dataset())
    for _ in range(20):
        next(iterator)
    state = json.dumps(iterator.get_state())
    rest = [int(next(iterator)) for _ in range(60)]
    again = iter(shuffled(50, 3).to_iter_dataset())
    again.set_state(json.loads(state))
    assert [int(next(again)) for _ in range(60)] == rest
    assert rest == [int(shuffled(50, 3)[i]) for i in range(20, 80)]


def test_seeds_depend_on_every_part_of_their_path():
    base = derive_seeds(4, 0, 1, 2, 3)
    assert base == derive_seeds(4, 0, 1, 2, 3)
    assert len(set(base)) == 4 and all(0 <= seed < 2**31 for seed in base)
    for path in ((1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 4)):
        assert not set(base) & set(derive_seeds(4, *path))


def test_prompt_of_a_tokenizer_without_a_template_is_bos_and_the_problem():
    tokenizer = tiny().tokenizer
    ids = prompt_ids(tokenizer, "A:1+2?")
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "A:1+2?"
    with pytest.raises(ValueError, match="problem is empty"):
        prompt_ids(tokenizer, " \n")


def test_prompt_of_a_chat_model_has_the_problem_then_the_instruction():
    path = shared_path("qwen3_tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = (path / "chat_template_instruct_2507.jinja").read_text()
    text = tokenizer.decode(prompt_ids(tokenizer, "What is 1+1?"))
    assert text.startswith("<|im_start|>user\nWhat is 1+1?\n\n" + INSTRUCTION[:40])
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_long_prompts_are_left_out():
    tokenizer = tiny().tokenizer
    problems = [Problem("A:1+2?", "3"), Problem("A:1+2;B:3+4?", "0")]
    kept, prompts = encode_problems(tokenizer, problems, 8)
    assert kept == problems[:1] and len(prompts[0]) == 7
    with pytest.raises(ValueError, match="max_prompt_tokens=3; the shortest has 7"):
        encode_problems(tokenizer, problems, 3)
