"""What the engine returns: a finished answer with its tree, log-probs and figures."""

import dataclasses

import numpy as np

from npr_jax.tree import TreeLayout

FINISH_REASONS = (
    "stop",
    "length",
    "branch_eos",
    "branch_length",
    "malformed",
    "invalid_block",
    "pages_exhausted",
    "aborted",
    "error",
)
TRUNCATED = ("length", "branch_length", "pages_exhausted")  # of these, cut off by a limit


@dataclasses.dataclass(frozen=True, eq=False)
class Trajectory:
    """One answer, flat in depth-first order: T tokens, prompt and response.

    Attributes:
      token_ids: i32[T].
      prompt_len: number of prompt tokens.
      layout: what was really forked; a block decoded sequentially is plain text in it.
      logp: f32[T], raw log-prob (temperature 1, no penalty, no filter) of every sampled token; 0
        for the prompt and for forced tokens.
      logp_sampled: f32[T], the same under the distribution that was sampled from.
      margin: f32[T], by how much the token won (the perturbed logits, best minus second).
      step: i32[T], the engine's decode step (`Engine.stats`) that drew the token; -1 for the prompt
        and for forced tokens.
      forced: bool[T], tokens of the response that the engine wrote.
      text: of the response; None without a tokenizer.
      finish_reason: one of FINISH_REASONS; `detail` says more.
      stats: figures: tokens, critical_path, branches, width, depth, sampled, preempted.
    """

    token_ids: np.ndarray
    prompt_len: int
    layout: TreeLayout
    logp: np.ndarray
    logp_sampled: np.ndarray
    margin: np.ndarray
    step: np.ndarray
    forced: np.ndarray
    text: str | None
    finish_reason: str
    detail: str
    stats: dict

    @property
    def response_ids(self) -> np.ndarray:
        """Token ids of the response, i32[T - prompt_len]."""
        return self.token_ids[self.prompt_len :]
