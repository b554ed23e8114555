"""Perplexity from generate's own logits, against a separate pass that scores the whole text."""

from __future__ import annotations

import math

import pytest
import torch

from finegrain_ops.methods.perplexity import answer_mask, new_tokens, perplexity, token_log_probabilities
from talking_llava import BOS, EOS, IMAGE, PAD, make_images, make_processor, saying

SCORED = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True, "suppress_tokens": [IMAGE, PAD]}


@pytest.fixture(scope="module")
def inputs():
    texts = ["<image> What ?", "<image> And which one of all these ?", "<image>"]
    images = make_images(3)
    return make_processor()(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")


def scored_apart(model, inputs, row: int, answer: list[int]) -> float:
    """exp of the mean loss of one answer after its own prompt, without padding, in one pass."""
    real = inputs["attention_mask"][row].bool()
    ids = torch.cat([inputs["input_ids"][row][real], torch.tensor(answer)])[None]
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"][row : row + 1]).logits[0]
    losses = torch.nn.functional.cross_entropy(
        logits[-len(answer) - 1 : -1].double(), torch.tensor(answer), reduction="mean"
    )
    return math.exp(float(losses))


def answers_of(output, num_steps: int) -> list[list[int]]:
    rows = output.sequences[:, output.sequences.shape[1] - num_steps :].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


GENERATION = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 2.0, "top_k": 5},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 4},
    "beams returned": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
@pytest.mark.parametrize("eos", [EOS, [EOS, 101]], ids=["one end token", "two"])
def test_equals_a_separate_scoring_pass(model, inputs, options: dict, eos) -> None:
    """Two end tokens, one of which is common, so that rows of the batch end early and are padded."""
    torch.manual_seed(0)
    output = model.generate(**inputs, **SCORED, **options, eos_token_id=eos)
    beams = getattr(output, "beam_indices", None)
    tokens = new_tokens(output.sequences, len(output.logits), beams)
    actual = perplexity(tokens, output.logits, eos_token_id=eos, pad_token_id=PAD, beam_indices=beams)
    copies = options.get("num_return_sequences", 1)
    assert actual.shape == (3 * copies,)
    assert actual.dtype == torch.float32
    ends = {EOS} if eos == EOS else set(eos)
    for i, row in enumerate(tokens.tolist()):
        end = next((k + 1 for k, token in enumerate(row) if token in ends), len(row))
        assert all(token == PAD for token in row[end:])
        assert actual[i].item() == pytest.approx(scored_apart(model, inputs, i // copies, row[:end]), rel=1e-5)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_rows_that_end_early(model, inputs, num_beams: int) -> None:
    """Answers of 0, 3 and 9 bytes in one batch: the end token counts, the padding after it does not."""
    said = ["", "yes", "in a tree"]
    texts = [text for text in said for _ in range(num_beams)]
    output = model.generate(**inputs, **SCORED, **saying(texts), num_beams=num_beams, do_sample=False)
    beams = getattr(output, "beam_indices", None)
    tokens = new_tokens(output.sequences, len(output.logits), beams)
    mask = answer_mask(tokens, EOS, PAD)
    assert mask.sum(1).tolist() == [1, 4, 10]
    actual = perplexity(tokens, output.logits, eos_token_id=EOS, pad_token_id=PAD, beam_indices=beams)
    for i, answer in enumerate(answers_of(output, tokens.shape[1])):
        assert actual[i].item() == pytest.approx(scored_apart(model, inputs, i, answer), rel=1e-5)


ENDS = {
    "nothing ends it": ([5, 6, 7], 3, None, PAD),
    "the end token, then padding": ([5, EOS, PAD, PAD], 2, EOS, PAD),
    "the end token last": ([5, 6, EOS], 3, EOS, PAD),
    "the end token is the padding": ([5, EOS, EOS, EOS], 2, EOS, EOS),
    "several end tokens": ([5, 9, PAD, PAD], 2, [EOS, 9], PAD),
    "stopped without an end token": ([5, 6, PAD, PAD], 2, EOS, PAD),
    "padding inside": ([5, PAD, 6, EOS], 4, EOS, PAD),
    "only the end token": ([EOS, PAD, PAD], 1, EOS, PAD),
    "nothing at all": ([PAD, PAD], 0, EOS, PAD),
    "no padding token": ([5, EOS, 0, 0], 2, EOS, None),
}


@pytest.mark.parametrize(("row", "length", "eos", "pad"), ENDS.values(), ids=ENDS)
def test_what_belongs_to_the_answer(row: list[int], length: int, eos, pad) -> None:
    mask = answer_mask(torch.tensor([row]), eos, pad)[0]
    assert mask.tolist() == [i < length for i in range(len(row))]


def test_uniform_logits_and_an_empty_answer() -> None:
    tokens = torch.tensor([[BOS, 5, EOS], [PAD, PAD, PAD]])
    values = perplexity(tokens, [torch.zeros(2, 50)] * 3, eos_token_id=EOS, pad_token_id=PAD)
    assert values[0].item() == pytest.approx(50.0, rel=1e-6)
    assert values[1].isnan()


def test_half_precision_logits_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    logits = [(torch.randn(1, 300) * 4).half() for _ in range(40)]
    tokens = torch.randint(300, (1, 40))
    exact = [torch.log_softmax(step.double(), -1)[0, token] for step, token in zip(logits, tokens[0])]
    actual = token_log_probabilities(tokens, logits)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual[0].double(), torch.stack(exact), atol=1e-5, rtol=0)


def test_new_tokens_with_the_prompt_before_them_and_without() -> None:
    with_prompt = torch.arange(12).reshape(2, 6)
    assert torch.equal(new_tokens(with_prompt, 2), with_prompt[:, 4:])
    assert torch.equal(new_tokens(with_prompt[:, 4:], 2), with_prompt[:, 4:])
    assert torch.equal(new_tokens(with_prompt, 5, torch.zeros(2, 3)), with_prompt[:, 3:])  # a beam that ended earlier


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="tokens: expected"):
        perplexity(torch.zeros(1, 4, dtype=torch.long), [torch.zeros(1, 9)] * 3)
    with pytest.raises(ValueError, match="pass beam_indices"):
        perplexity(torch.zeros(1, 3, dtype=torch.long), [torch.zeros(4, 9)] * 3)
