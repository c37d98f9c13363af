"""Small tokenizers of the two kinds there are, a token per character or byte, no merges."""

import string

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def byte_level() -> PreTrainedTokenizerFast:
    """As of GPT-2 and Qwen: a token is some bytes of UTF-8. Returns one whose ids are bytes."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    letters = {byte: chr(byte) for byte in own}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    core = Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def sentencepiece_like(scheme: str) -> PreTrainedTokenizerFast:
    """As of Llama 2: texts begin with a space (behind a special token too, if `scheme` is "always"
    and not "first"), and characters that are no tokens are bytes, which have the ids 0 to 255."""
    special = ["<unk>", "<s>", "</s>"]
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += [*special, SPACE, *(c for c in string.printable[:95] if c != " ")]
    vocab = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    if scheme == "always":
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
