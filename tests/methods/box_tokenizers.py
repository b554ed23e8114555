"""Tokenizers of several kinds that can spell boxes, with tokens of more than one character."""

from __future__ import annotations

from collections.abc import Sequence

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

CHARACTERS = [*'0123456789.,[](){}<|>_:"', *"abcdefghijklmnopqrstuvwxyz"]
SPECIAL = ["<unk>", "<s>", "</s>"]


def fast(tokenizer: Tokenizer, special: Sequence[str] = ()) -> transformers.PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in (*SPECIAL, *special)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def merged(merges: Sequence[tuple[str, str]], special: Sequence[str] = ()) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE that merges across what GPT-2's pattern keeps apart."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges), *special]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return fast(tokenizer, special)


def byte_bpe(special: Sequence[str] = ()) -> transformers.PreTrainedTokenizerFast:
    space = "\u0120"
    merges = [("0", "."), (",", space), ("]", ","), ("2", "5"), ("5", "0"), (f",{space}", "0"), (space, "[")]
    merges += [(f",{space}", "0."), ("1", "0"), ("10", "0"), ("[", "0."), (")", ","), ("),", "("), ("5", "]")]
    return merged(merges, special)


def sentencepiece_bpe(left_out: str = "", extra: Sequence[str] = ()) -> transformers.PreTrainedTokenizerFast:
    """As Llama's: U+2581 for spaces, one before every text, bytes where there is no piece."""
    pieces = [c for c in CHARACTERS if c not in left_out]
    merges = [("\u2581", c) for c in ("\u2581", "[", "0") if c not in left_out]
    words = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *pieces, *("".join(pair) for pair in merges)]
    words += extra
    model = models.BPE(
        {word: i for i, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast(tokenizer)


def metaspace_unigram() -> transformers.PreTrainedTokenizerFast:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("\u2581", -4.0), ("\u2581[", -2.0), ("0.", -3.0)]
    pieces += [(c, -5.0) for c in CHARACTERS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return fast(tokenizer)
