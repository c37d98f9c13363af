"""The tree of a trace: which token sees which, at what position, and what predicts it.

A trace is a flat list of token ids in depth-first order. Its blocks

    <guideline> <plan>1: ...</plan> ... </guideline>      the trunk writes the plans
    <step> 1: ... </step> ...                             one branch per plan, blind to its siblings
    <takeaway> ... </takeaway>                            the trunk goes on and sees every branch

are found by one `Automaton`, and `layout` turns their spans into a `TreeLayout`: positions, hidden
intervals and predictors, three integer arrays that the model, the engine and the trainer share.
Nothing else in the package parses tags.

Invariant: key k is visible to query q iff k <= q and no interval hidden[k, d] = [end, join) holds
q; and under the strict rule position[q] = 1 + the largest position among the other tokens q sees.
`Rules` change what a join keeps, what a branch sees, and where the trunk goes on.
"""

from npr_jax.tree.layout import Block, TreeLayout, group, layout, pack
from npr_jax.tree.parse import (
    MAX_HEADERS,
    STEPS,
    TAG_NAMES,
    Automaton,
    TagIds,
    TraceError,
    parse,
)
from npr_jax.tree.rules import Rules

__all__ = [
    "MAX_HEADERS",
    "STEPS",
    "TAG_NAMES",
    "Automaton",
    "Block",
    "Rules",
    "TagIds",
    "TraceError",
    "TreeLayout",
    "group",
    "layout",
    "pack",
    "parse",
]
