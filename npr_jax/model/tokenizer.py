"""Tokenizers through transformers: the eight tags, the rows they need, and the demo's alphabet."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from npr_jax.model.config import ModelConfig, pad_vocab
from npr_jax.tree import TAG_NAMES


def text_ids(tokenizer, text: str) -> list[int]:
    """The ids of a text that a model is to go on with: begun as the tokenizer begins texts, but
    never with two beginning-of-text tokens, where the text brings one; and without an end."""
    ids = encode(tokenizer, text)
    begin = list(tokenizer.encode(""))[:1]
    if begin and begin[0] == tokenizer.bos_token_id and ids[:1] != begin:
        return begin + ids
    return ids


def encode(tokenizer, text: str) -> list[int]:
    """The ids of a text alone; raises ValueError for one that the tokenizer has none for."""
    try:
        return list(tokenizer.encode(text, add_special_tokens=False))
    except Exception as error:  # the library's: TypeError for lone surrogates, or just Exception
        shown = text if len(text) < 100 else text[:100] + "..."
        raise ValueError(
            f"the tokenizer cannot encode {shown!r} ({error}), needed are Unicode text and a "
            "tokenizer with ids for all of it"
        ) from error


def has_tags(tokenizer, vocab_size: int | None = None) -> bool:
    """Whether every tag is a single token of its own, with an id below `vocab_size`."""
    return not _missing_tags(tokenizer, vocab_size)


def _missing_tags(tokenizer, vocab_size: int | None) -> list[str]:
    """The tags that are no single token, or one to which the model has no row."""
    missing = []
    for tag in TAG_NAMES:
        ids = encode(tokenizer, tag)
        known = len(ids) == 1 and ids[0] != tokenizer.unk_token_id
        if not known or (vocab_size is not None and ids[0] >= vocab_size):
            missing.append(tag)
    return missing


def add_tags(config: ModelConfig, params: dict, tokenizer) -> tuple[ModelConfig, dict]:
    """Makes the eight tags single tokens of `tokenizer` (changed in place) and gives them rows.

    The row of a tag that was missing, in the embedding and in an untied head, is the mean of the
    old rows of its word ("guideline" for `<guideline>`, "/guideline" for `</guideline>`); all rows
    of tokens that were there stay. The vocabulary never shrinks: ids below the checkpoint's size
    keep their rows; other tokens that only the tokenizer has get the mean of all rows. Nothing
    changes if the tags are there.

    Raises ValueError if the tokenizer has no tokens for a tag's word.
    """
    missing = _missing_tags(tokenizer, config.vocab_size)
    if not missing:
        return config, params
    words = {tag: encode(tokenizer, tag[1:-1]) for tag in missing}
    for tag, ids in words.items():
        if not [i for i in ids if i < config.vocab_size]:
            raise ValueError(
                f"the tokenizer has no tokens for {tag[1:-1]!r}, whose rows {tag} would start from"
            )
    tokenizer.add_tokens(list(TAG_NAMES), special_tokens=True)
    size = max(config.vocab_size, len(tokenizer))
    rows = max(pad_vocab(size), config.padded_vocab_size)
    had = config.vocab_size
    config = dataclasses.replace(config, vocab_size=size, padded_vocab_size=rows)

    def grow(table):  # [rows, D], on the host or the device, where it was
        old = np.asarray(table)
        new = np.zeros((rows, old.shape[1]), old.dtype)
        new[: len(old)] = old
        if size > had:
            new[had:size] = old[:had].mean(0, dtype=np.float32).astype(old.dtype)
        for tag, ids in words.items():
            mean = old[[i for i in ids if i < had]].astype(np.float32).mean(0)
            new[tokenizer.convert_tokens_to_ids(tag)] = mean.astype(old.dtype)
        return new if isinstance(table, np.ndarray) else jnp.asarray(new)

    params = params | {"embed": grow(params["embed"])}
    if "unembed" in params:
        params["unembed"] = grow(params["unembed"].T).T
    return config, params


DEMO_SYMBOLS = ("\\boxed{", "}", "\n", *"0123456789", *"+*=:;?", *"ABCDEFGH", "S")


def demo_tokenizer(symbols: Sequence[str] = DEMO_SYMBOLS):
    """The tiny model's tokenizer: a token per symbol, no merges.

    Text outside the alphabet is dropped by the encoder; `symbols` are all that it knows.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", *TAG_NAMES]
    vocab = {token: i for i, token in enumerate([*special, *symbols])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=None))
    core.add_special_tokens(special)
    core.add_tokens([symbol for symbol in symbols if len(symbol) > 1])
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
