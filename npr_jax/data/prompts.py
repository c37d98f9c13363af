"""From a problem to prompt token ids: one way for training, evaluation and batch inference."""

from npr_jax.model.tokenizer import encode

INSTRUCTION = """\
Solve the problem by splitting the work into steps that can run at the same time.

Write one block, or several blocks one after the other, each in exactly this form:

<guideline>
<plan>1: what the first step does</plan>
<plan>2: what the second step does</plan>
</guideline>
<step>
1: the work of plan 1
</step>
<step>
2: the work of plan 2
</step>
<takeaway>
what follows from the steps together
</takeaway>

A block has one to five plans, numbered from 1 in order, and one step for each plan under the same \
number. A step cannot read the other steps of its block: it may use only the problem, earlier \
blocks and the guideline. The takeaway reads all steps. Write nothing between the parts of a block \
or between blocks. After the last block state the result, with the final answer in one \\boxed{}."""


def prompt_ids(tokenizer, problem: str, instruction: str = INSTRUCTION) -> list[int]:
    """Token ids of the prompt for a problem.

    With a chat template: one user turn, the problem and then the instruction, and the header of the
    assistant's turn. A tokenizer without one belongs to a model that was trained on bare problems:
    the problem's text alone. Begun as the tokenizer begins texts (`begun`).

    Raises ValueError for an empty problem, for one that the tokenizer cannot encode, and for a
    template that cannot be used with this turn.
    """
    if not problem.strip():
        raise ValueError("the problem is empty, needed is some text")
    if tokenizer.chat_template:
        content = f"{problem}\n\n{instruction}" if instruction else problem
        return chat_ids(tokenizer, [{"role": "user", "content": content}], "a user's turn")
    return begun(tokenizer, encode(tokenizer, problem))


def chat_ids(tokenizer, turns: list[dict], name: str, **options) -> list[int]:
    """Token ids of a conversation ({role, content} each) and the header of the assistant's turn;
    `options` are the template's own.

    Raises ValueError, which calls the turns by `name`, where the tokenizer's chat template cannot
    be used with them.
    """
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **options
        )
    except Exception as error:  # a template is a program
        raise ValueError(
            f"the tokenizer's chat template cannot be used with {name}: {error}"
        ) from error
    return begun(tokenizer, encode(tokenizer, text))


def begun(tokenizer, ids: list[int]) -> list[int]:
    """The ids with one beginning-of-text token, where the model was trained with one: its tokenizer
    begins texts with it, or has one and no chat template that could."""
    begin = tokenizer.bos_token_id
    if begin is None or ids[:1] == [begin]:
        return ids
    own = not tokenizer.chat_template or list(tokenizer.encode(""))[:1] == [begin]
    return [begin, *ids] if own else ids
