"""A tokenizer's tokens as the characters of a box: which may come next, and how forced text is written with them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from .box_grammar import BoxFormat, BoxState

_LONGEST = 32  # characters of a token; no piece of any format is longer
_MARKS_OF_SPACE = str.maketrans({"\u2581": " ", "\u0120": " "})  # SentencePiece's and byte-level BPE's


class Option(NamedTuple):
    """A token that may come next, its text, and the state after it."""

    token: int
    text: str
    after: BoxState


class BoxVocabulary:
    """The tokens that one tokenizer has for the boxes of one format.

    Args:
        tokenizer: a tokenizer of transformers.
        written: the format.

    Raises:
        ValueError: the tokenizer cannot spell a box.
    """

    def __init__(self, tokenizer: Any, written: BoxFormat) -> None:
        pieces = [*written.pieces, *"0123456789", *("." if written.decimals else "")]
        self._tokenizer = tokenizer
        self._texts = _texts_of_tokens(tokenizer, {" ", *"".join(pieces)})
        self._by_text: dict[str, int] = {}
        self._by_first: dict[str, list[tuple[int, str]]] = {}
        for token, text in self._texts.items():
            self._by_text.setdefault(text, token)
            self._by_first.setdefault(text[0], []).append((token, text))
        missing = [piece for piece in pieces if self._spelled(piece) is None]
        if missing:
            raise ValueError(
                f"processor: expected a tokenizer that can write {written.text((0, 0, 1, 1))!r}, got "
                f"{type(tokenizer).__name__}, which cannot spell {missing}; constrained=False writes freely"
            )
        self.allowed = functools.lru_cache(maxsize=4096)(self._allowed)

    def _allowed(self, state: BoxState) -> tuple[Option, ...]:
        """Every token that may come next."""
        pairs = (pair for first in state.next_characters() for pair in self._by_first.get(first, ()))
        return tuple(Option(token, text, after) for token, text in pairs if (after := state.after(text)) is not None)

    def sure(self, state: BoxState, before: str, text: str) -> list[Option]:
        """Of the tokens of `text`, which `state` allows, after the text `before`: those up to where a token reaches
        from `text` into what follows. Where "0." is forced and "0.41" is a token, that is none at all.
        """
        options = []
        for option in self.options_of(state, before, text):
            if any(len(token_text) > len(text) for _, token_text, _ in self.allowed(state)):
                break
            options.append(option)
            state, text = option.after, text[len(option.text) :]
        return options

    def options_of(self, state: BoxState, before: str, text: str) -> list[Option]:
        """The tokens of `text`, which `state` allows, after the text `before`."""
        options = []
        for token in self._tokens_of(before, text):
            after = state.after(self._texts[token])
            assert after is not None
            options.append(Option(token, self._texts[token], after))
            state = after
        return options

    def _tokens_of(self, before: str, text: str) -> list[int]:
        """As the tokenizer cuts the whole of it, where it cuts between the two; the longest tokens first otherwise."""
        head, whole = (self._tokenizer.encode(part, add_special_tokens=False) for part in (before, before + text))
        tokens = whole[len(head) :]
        if whole[: len(head)] == head and "".join(self._texts.get(token, "?") for token in tokens) == text:
            return tokens
        spelled = self._spelled(text)
        assert spelled is not None  # as was seen when the vocabulary was made
        return spelled

    def _spelled(self, text: str) -> list[int] | None:
        tokens = []
        while text:
            piece = next((text[:n] for n in range(len(text), 0, -1) if text[:n] in self._by_text), None)
            if piece is None:
                return None
            tokens.append(self._by_text[piece])
            text = text[len(piece) :]
        return tokens


def _texts_of_tokens(tokenizer: Any, alphabet: set[str]) -> dict[int, str]:
    """The text of every token that is made of these characters only, and is decoded as it is spelled: "<0x30>" is not.

    A token is decoded after another one: alone, some tokenizers drop the space that it begins with.
    """
    pieces = [str(piece or "") for piece in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    spelled = [piece.translate(_MARKS_OF_SPACE) for piece in pieces]
    tokens = [i for i, piece in enumerate(spelled) if 0 < len(piece) <= _LONGEST and set(piece) <= alphabet]
    anchor = next((token for token in tokens if pieces[token] == "0"), None)
    if anchor is None:
        return {}
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    head = tokenizer.decode([anchor], **options)
    texts = tokenizer.batch_decode([[anchor, token] for token in tokens], **options)
    return {token: spelled[token] for token, text in zip(tokens, texts) if text == head + spelled[token]}
