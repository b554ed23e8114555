"""A tokenizer's tokens as characters of boxes, for the kinds of tokenizers that there are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import transformers

pytest.importorskip("hypothesis", reason="hypothesis draws the boxes")
from hypothesis import given, settings
from hypothesis import strategies as st

import spelling_models
import talking_llava
from box_tokenizers import byte_bpe, merged, metaspace_unigram, sentencepiece_bpe
from finegrain_ops.methods.box_grammar import JSON, LIST, LIST_OF_THOUSANDTHS, MARKUP, BoxFormat, BoxGrammar
from finegrain_ops.methods.box_vocabulary import BoxVocabulary

BOX_MARKS = ["<|box_start|>", "<|box_end|>"]
TOKENIZERS: dict[str, Callable[[], transformers.PreTrainedTokenizerFast]] = {
    "bytes": talking_llava.make_tokenizer,
    "bytes and markup": lambda: spelling_models.make_tokenizer("<|image_pad|>"),
    "bytes, merged": byte_bpe,
    "bytes, merged, and markup": lambda: byte_bpe(BOX_MARKS),
    "sentencepiece": sentencepiece_bpe,
    "metaspace": metaspace_unigram,
}
FORMATS = {"list": LIST, "thousandths": LIST_OF_THOUSANDTHS, "markup": MARKUP, "json": JSON}
CASES = [(name, kind) for name in TOKENIZERS for kind in FORMATS]
MADE: dict[tuple[str, BoxFormat], tuple[transformers.PreTrainedTokenizerFast, BoxVocabulary]] = {}


def made(name: str, written: BoxFormat) -> tuple[transformers.PreTrainedTokenizerFast, BoxVocabulary]:
    if (name, written) not in MADE:
        tokenizer = TOKENIZERS[name]()
        MADE[name, written] = tokenizer, BoxVocabulary(tokenizer, written)
    return MADE[name, written]


def text_of(piece: str) -> str:
    return piece.replace("\u2581", " ").replace("\u0120", " ")


@st.composite
def texts(draw: st.DrawFn, written: BoxFormat) -> tuple[BoxGrammar, str]:
    units = 10**written.decimals if written.decimals else 1000
    low = [draw(st.integers(0, units - 1)) for _ in range(2)]
    high = [draw(st.integers(edge + 1, units)) for edge in low]
    lead = draw(st.sampled_from(["", " "])) if written.may_lead_with_space else ""
    return BoxGrammar(written, (units, units)), lead + written.text([*low, *high])


@pytest.mark.parametrize(("name", "kind"), CASES)
@settings(max_examples=25)
@given(st.data())
def test_options_spell_the_text_wherever_it_is_cut(name: str, kind: str, data: st.DataObject) -> None:
    written = FORMATS[kind]
    tokenizer, vocabulary = made(name, written)
    grammar, text = data.draw(texts(written))
    cut = data.draw(st.integers(0, len(text)))
    state = grammar.start().after(text[:cut])
    options = vocabulary.options_of(state, text[:cut], text[cut:])
    assert "".join(option.text for option in options) == text[cut:]
    said = ""
    for option in options:
        assert option.text == text_of(tokenizer.convert_ids_to_tokens(option.token))
        said += option.text
        assert option.after == state.after(said)
        assert option in vocabulary.allowed(state.after(said[: len(said) - len(option.text)]))
    if cut == 0:
        assert options[-1].after.is_complete
        assert tokenizer.decode([option.token for option in options]).strip() == text.strip()


@pytest.mark.parametrize(("name", "kind"), CASES)
@settings(max_examples=25)
@given(st.data())
def test_allowed_are_all_tokens_that_a_box_goes_on_with(name: str, kind: str, data: st.DataObject) -> None:
    written = FORMATS[kind]
    tokenizer, vocabulary = made(name, written)
    grammar, text = data.draw(texts(written))
    state = grammar.start().after(text[: data.draw(st.integers(0, len(text)))])
    expected = {
        token: text_of(piece)
        for piece, token in tokenizer.get_vocab().items()
        if state.after(text_of(piece)) is not None and text_of(piece)
    }
    allowed = vocabulary.allowed(state)
    assert {option.token: option.text for option in allowed} == expected
    assert all(option.after == state.after(option.text) for option in allowed)
    assert bool(allowed) != state.is_complete


def test_tokens_are_cut_as_the_tokenizer_cuts_them() -> None:
    tokenizer, vocabulary = made("bytes, merged", LIST)
    start = BoxGrammar(LIST, (100, 100)).start()

    def pieces(before: str, text: str) -> list[str]:
        options = vocabulary.options_of(start.after(before), before, text)
        return [option.text for option in options]

    assert pieces("", "[0.") == ["[0."]
    assert pieces("", " [0.") == [" [", "0."]
    assert pieces("[0.2", "5") == ["5"]  # the whole would be cut before the 2
    assert pieces("[0.25", ", 0.") == [", 0."]
    assert pieces("[0.25, 0.50, 0.75, 0.9", "5]") == ["5]"]
    whole = "[0.25, 0.50, 0.75, 0.99]"
    assert pieces("", whole) == [text_of(p) for p in tokenizer.tokenize(whole)]


def test_the_longest_tokens_are_taken_only_where_the_tokenizer_cuts_otherwise() -> None:
    vocabulary = BoxVocabulary(merged([("0", "]"), ("5", "0")]), LIST)
    start = BoxGrammar(LIST, (100, 100)).start()
    text = "[0.25, 0.10, 0.75, 0.50]"
    assert [option.text for option in vocabulary.options_of(start, "", text)][-2:] == ["5", "0]"]
    assert [option.text for option in vocabulary.options_of(start.after(text[:-1]), text[:-1], "]")] == ["]"]


def test_marks_of_a_space_that_are_decoded_as_they_are() -> None:
    """U+0120 is a space in byte-level BPE only."""
    tokenizer = sentencepiece_bpe(extra=["\u0120", "\u0120["])
    options = BoxVocabulary(tokenizer, LIST).allowed(BoxGrammar(LIST, (100, 100)).start())
    assert sorted(tokenizer.convert_ids_to_tokens([o.token for o in options])) == ["[", "\u2581", "\u2581["]


def test_special_tokens_are_used_and_not_spelled() -> None:
    for name in ("bytes and markup", "bytes, merged, and markup"):
        tokenizer, vocabulary = made(name, MARKUP)
        start = BoxGrammar(MARKUP, (1000, 1000)).start()
        text, state = start.forced()
        assert text == "<|box_start|>("
        options = vocabulary.options_of(start, "", text)
        assert tokenizer.convert_ids_to_tokens([o.token for o in options]) == ["<|box_start|>", "("]
        before = "<|box_start|>(1,2),(30,40)"
        state = start.after(before)
        (end,) = vocabulary.options_of(state, before, "<|box_end|>")
        assert tokenizer.convert_ids_to_tokens(end.token) == "<|box_end|>"
        assert end.after.is_complete
    spelled = made("bytes", MARKUP)[1].options_of(start, "", text)
    assert [option.text for option in spelled] == list(text)


def test_sentencepiece_bytes_are_no_characters() -> None:
    """<0x30> would be a zero; its piece is the one that the model writes. (The markup's letters spell such names.)"""
    tokenizer, vocabulary = made("sentencepiece", LIST)
    state = BoxGrammar(LIST, (100, 100)).start()
    assert {o.text for o in vocabulary.allowed(state)} == {" ", " [", "["}
    assert [o.text for o in vocabulary.options_of(state, "", " [")] == [" ["]
    assert [o.text for o in vocabulary.options_of(state, "", "[0.")] == ["[", "0", "."]
    assert {o.text for o in vocabulary.allowed(state.after("["))} == {"0"}
    zero = vocabulary.allowed(state.after("["))[0].token
    assert tokenizer.convert_ids_to_tokens(zero) == "0"


@pytest.mark.parametrize(
    ("left_out", "named"), [("7", r"\['7'\]"), ("0", "'0'"), (".", r"\['\.'\]"), ("]", r"\['\]'\]")]
)
def test_a_tokenizer_that_cannot_spell_a_box(left_out: str, named: str) -> None:
    with pytest.raises(ValueError, match=rf"processor: expected a tokenizer .*'\[0\.00, 0\.00, 0\.01.*{named}"):
        BoxVocabulary(sentencepiece_bpe(left_out), LIST)


def test_whole_numbers_need_no_point() -> None:
    tokenizer = sentencepiece_bpe(left_out=".")
    vocabulary = BoxVocabulary(tokenizer, JSON)
    text = JSON.text((1, 2, 30, 1000))
    options = vocabulary.options_of(BoxGrammar(JSON, (1000, 1000)).start(), "", text)
    assert "".join(option.text for option in options) == text
    with pytest.raises(ValueError, match=r"cannot spell \['\.'\]"):
        BoxVocabulary(tokenizer, LIST)
