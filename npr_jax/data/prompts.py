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
    the problem's text alone, after the tokenizer's bos token if it has one.

    Raises ValueError for an empty problem, for one that the tokenizer cannot encode, and for a
    template that cannot be used with this turn.
    """
    if not problem.strip():
        raise ValueError("the problem is empty, needed is some text")
    if tokenizer.chat_template:
        turn = {"role": "user", "content": f"{problem}\n\n{instruction}"}
        try:
            text = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program
            raise ValueError(
                f"the tokenizer's chat template cannot be used with a user's turn: {error}"
            ) from error
        return encode(tokenizer, text)
    ids = encode(tokenizer, problem)
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]
