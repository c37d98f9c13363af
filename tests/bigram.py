"""A random model whose next token follows a table, so that what it samples is often a tree.

Its layers are random and change the log-probs with everything a token sees (so a wrong mask or
position shows), but the large term of the logits depends on the last token only.
"""

import dataclasses

import jax
import numpy as np

from npr_jax.model import PRESETS, init_params
from npr_jax.model.pretrained import Model
from npr_jax.tree import TagIds
from npr_jax.tree.format import Violation

VOCAB = 40
EOS, NL = 2, 3
GO, GC, PO, PC, SO, SC, TO, TC = range(32, 40)
STEP_NUMBERS = (4, 5, 6, 7, 8)  # the last token of the headers of step 1..5
PLAN_TEXT, TEXT, TAKEAWAY_TEXT = (9, 10, 11), (12, 13, 14, 15, 16), (17, 18, 19)
TRUNK_TEXT = (20, 21, 22)
TAGS = TagIds(
    *range(32, 40),
    whitespace=frozenset({NL}),
    step_headers=tuple((NL, SO, NL, number) for number in STEP_NUMBERS),
    takeaway_header=(NL, TO, NL),
    decode=lambda ids: " ".join(map(str, ids)),
)


def table(eos=0.015, nested=0.07, end_step=0.2, illegal=0.01):
    """f64[V, V]: probabilities of the next token."""
    p = np.zeros((VOCAB, VOCAB))

    def follow(tokens, **choices):
        for token in tokens:
            for targets, weight in choices.values():
                p[token, list(targets)] += weight / len(targets)

    follow([GO], a=([PO], 1))
    follow([PO], a=(PLAN_TEXT, 1))
    follow(PLAN_TEXT, a=(PLAN_TEXT, 0.4), b=([PC], 0.6))
    follow([PC], a=([PO], 0.5), b=([GC], 0.5))
    follow(
        [*TEXT, *STEP_NUMBERS],
        a=(TEXT, 1 - eos - nested - end_step - illegal),
        b=([SC], end_step),
        c=([GO], nested),
        d=([EOS], eos),
        e=([TO], illegal),
    )
    follow(TRUNK_TEXT, a=(TRUNK_TEXT, 0.6), b=([GO], 0.4 - 12 * eos), c=([EOS], 12 * eos))
    follow([TC], a=(TRUNK_TEXT, 0.8), b=(TEXT, 0.2))
    follow([NL, *TAKEAWAY_TEXT], a=(TAKEAWAY_TEXT, 0.7), b=([TC], 0.3))
    p[p.sum(1) == 0] = 1 / VOCAB
    return p


def chain(**follows) -> np.ndarray:
    """f64[V, V]: tables of which each line of `follows` is (tokens, next tokens)."""
    p = np.zeros((VOCAB, VOCAB))
    for tokens, targets in follows.values():
        for target in targets:
            p[list(tokens), target] += 1 / len(targets)
    p[p.sum(1) == 0] = 1 / VOCAB
    return p


def check_block_without_numbers(token_ids, block, tags, max_branches):
    """The engine's check of a block for a table, which cannot count: only the number of plans."""
    if len(block.plans) > max_branches:
        reason = f"{len(block.plans)} plans, at most {max_branches}"
        return Violation("too_many_plans", 0, reason)
    return None


def model(seed=0, probabilities=None, **rates) -> Model:
    """3 layers, untied; logits = log of the table + what the random layers add."""
    config = dataclasses.replace(
        PRESETS["tiny"],
        vocab_size=VOCAB,
        padded_vocab_size=48,
        tie_word_embeddings=False,
        eos_token_ids=(EOS,),
        max_position_embeddings=4096,
    )
    params = jax.tree.map(np.array, init_params(config, jax.random.key(seed), "float32"))
    rng = np.random.default_rng(seed)
    embed = rng.normal(size=params["embed"].shape).astype(np.float32)
    embed /= np.sqrt((embed**2).mean(-1, keepdims=True))  # the final norm leaves them as they are
    wanted = table(**rates) if probabilities is None else probabilities
    goal = np.log(wanted + 1e-4) + 0.3 * rng.normal(size=(VOCAB, VOCAB))
    params["embed"] = embed
    for name in ("wo", "w_down"):
        params["layers"][name] *= 0.5
    params["final_norm"] = np.ones_like(params["final_norm"])
    unembed = np.zeros((config.hidden_size, config.padded_vocab_size), np.float32)
    unembed[:, :VOCAB] = np.linalg.lstsq(embed[:VOCAB], goal, rcond=None)[0]
    params["unembed"] = unembed
    params = jax.tree.map(jax.numpy.asarray, params)
    return Model(config=config, params=params, tokenizer=None, tags=TAGS)
