"""Tokenizers through transformers: the eight tags, the rows they need, and the demo's alphabet."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from npr_jax.model.config import ModelConfig, pad_vocab
from npr_jax.tree import TAG_NAMES


def has_tags(tokenizer) -> bool:
    """Whether every tag is a single token."""
    return all(len(tokenizer.encode(tag, add_special_tokens=False)) == 1 for tag in TAG_NAMES)


def add_tags(config: ModelConfig, params: dict, tokenizer) -> tuple[ModelConfig, dict]:
    """Makes the eight tags single tokens of `tokenizer` (changed in place) and gives them rows.

    A tag's row, in the embedding and in an untied head, is the mean of the old rows of its word
    ("guideline" for `<guideline>`, "/guideline" for `</guideline>`). The vocabulary never shrinks:
    ids below the checkpoint's size keep their rows. Nothing changes if the tags are there.
    """
    if has_tags(tokenizer):
        return config, params
    words = {tag: tokenizer.encode(tag[1:-1], add_special_tokens=False) for tag in TAG_NAMES}
    tokenizer.add_tokens(list(TAG_NAMES), special_tokens=True)
    size = max(config.vocab_size, len(tokenizer))
    rows = max(pad_vocab(size), config.padded_vocab_size)
    config = dataclasses.replace(config, vocab_size=size, padded_vocab_size=rows)

    def grow(table):  # [rows, D], on the host or the device, where it was
        old = np.asarray(table)
        new = np.zeros((rows, old.shape[1]), old.dtype)
        new[: len(old)] = old
        for tag, ids in words.items():
            mean = old[ids].astype(np.float32).mean(0)
            new[tokenizer.convert_tokens_to_ids(tag)] = mean.astype(old.dtype)
        return new if isinstance(table, np.ndarray) else jnp.asarray(new)

    params = params | {"embed": grow(params["embed"])}
    if "unembed" in params:
        params["unembed"] = grow(params["unembed"].T).T
    return config, params


DEMO_SYMBOLS = ("\\boxed{", "}", "\n", *"0123456789", *"+*=:;?", *"ABCDEFGH", "S")


def demo_tokenizer():
    """The tiny model's tokenizer: 64 ids or fewer, a token per symbol, no merges.

    Text outside the alphabet is dropped by the encoder; `DEMO_SYMBOLS` is all that it knows.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", *TAG_NAMES]
    vocab = {token: i for i, token in enumerate([*special, *DEMO_SYMBOLS])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=None))
    core.add_special_tokens(special)
    core.add_tokens(["\\boxed{"])
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=list(TAG_NAMES),
        clean_up_tokenization_spaces=False,
    )
