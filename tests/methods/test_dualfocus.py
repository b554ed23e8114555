"""DualFocus on a tiny random LLaVA: which answer is chosen, what is skipped, what is computed once, and bad input. That
the answers are right is in test_dualfocus_families.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import finegrain_ops
import tiny_qformer
from finegrain_ops import DualFocus, UnsupportedInputError, UnsupportedModelError
from finegrain_ops.methods import dualfocus as module
from finegrain_ops.methods.dualfocus import BOX_PROMPT, COMBINE_PROMPT, Pathway
from finegrain_ops.methods.prompt_tree import PromptTree
from talking_llava import EOS, GRID, IMAGE, PAD, make_images, make_model, make_processor, saying, traces

QUESTIONS = ["Where is the cup?", "And which one of these?", "Why?"]
SHORT = {"max_new_tokens": 6, "suppress_tokens": [IMAGE, PAD]}
BOX = "[0.20, 0.30, 0.61, 0.72]"


@pytest.fixture(scope="module")
def answers(model, processor) -> list:
    """Of all defaults."""
    return DualFocus(model, processor).answer_batch(make_images(3), QUESTIONS, **SHORT)


def same(pathway: Pathway | None, expected: Pathway | None) -> bool:
    if pathway is None or expected is None:
        return pathway is expected
    close = math.isclose(pathway.perplexity, expected.perplexity, rel_tol=1e-4)
    return close and (pathway.text, pathway.tokens) == (expected.text, expected.tokens)


def saying_boxes(model, processor, *texts: str, **options) -> DualFocus:
    """The model is free to write a box, and writes these texts."""
    return DualFocus(model, processor, constrained=False, grounding_generation=saying(texts), **options)


class Rows:
    """How many rows of tokens, or images, went through a module, in each call."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.calls: list[tuple[int, ...]] = []
        self.hook = module.register_forward_hook(lambda _, __, output: self.calls.append(tuple(output.shape[:-1])))

    def __enter__(self) -> list[tuple[int, ...]]:
        return self.calls

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


def encoded(model) -> Rows:
    """The images that the vision encoder runs, inside of it, where vision_once replaces nothing."""
    layers = model.model.vision_tower.modules()
    return Rows(next(layer for layer in layers if isinstance(layer, torch.nn.LayerNorm)))


# --- what is asked and answered -----------------------------------------------------------------------------------


def test_a_batch_is_its_questions_one_by_one(model, processor, answers) -> None:
    for image, question, together in zip(make_images(3), QUESTIONS, answers):
        alone = DualFocus(model, processor).answer(image, question, **SHORT)
        assert same(alone.macro, together.macro)
        assert same(alone.micro, together.micro)
        assert (alone.grounding_text, alone.box, alone.crop) == (
            together.grounding_text,
            together.box,
            together.crop,
        )
        assert (alone.text, alone.chosen, alone.reason) == (together.text, together.chosen, together.reason)


def test_the_papers_prompts(model, processor, monkeypatch) -> None:
    run, seen = module.Passes.__init__, []
    monkeypatch.setattr(module.Passes, "__init__", lambda *a: seen.append(a) or run(*a))
    follow_up, second = module.Prompter.follow_up, []
    monkeypatch.setattr(module.Prompter, "follow_up", lambda *a: second.append(follow_up(*a)) or second[-1])
    DualFocus(model, processor).answer(make_images(1)[0], "What is {it}?", **SHORT)
    _, _, _, macro, box = seen[0]
    texts = [
        processor.tokenizer.decode(inputs["input_ids"][0]).replace("<image>" * GRID**2, "<image>")
        for inputs in (macro, box)
    ]
    assert texts[0] == "<s>USER: <image>\nWhat is {it}? ASSISTANT:"
    assert texts[1] == (
        "<s>USER: <image>\nPlease provide the bounding box coordinate of the region this question asks: What is {it}? "
        "ASSISTANT:"
    )
    assert second == [
        "</s>USER: <image>\nPlease combine the information from these two images and answer this question: What is "
        "{it}? ASSISTANT:"
    ]


def test_prompts_can_be_replaced(model, processor, monkeypatch) -> None:
    asked = []
    texts, follow_up = module.Prompter.texts, module.Prompter.follow_up
    monkeypatch.setattr(module.Prompter, "texts", lambda s, i, q: asked.append(q) or texts(s, i, q))
    monkeypatch.setattr(module.Prompter, "follow_up", lambda s, q: asked.append(q) or follow_up(s, q))
    method = DualFocus(model, processor, prompt="Where? {question}", combine_prompt=lambda question: question.upper())
    method.answer(make_images(1)[0], "why", **SHORT)
    assert asked == [["why"], ["Where? why"], "WHY"]


def test_the_answer_of_lower_perplexity_is_chosen(answers) -> None:
    for result in answers:
        surer = min((result.macro, result.micro), key=lambda pathway: pathway.perplexity)
        assert (result.text, result.perplexity) == (surer.text, surer.perplexity)
        assert result.chosen == ("macro" if surer is result.macro else "micro")
        assert result.reason == "perplexity"


LETTERS = {  # macro, micro, of perplexities 3 and 2 -> chosen and why
    "both valid": ("A", "B", "micro", "perplexity"),
    "neither": ("yes", "no", "micro", "perplexity"),
    "macro alone": ("(a) a cat", "It is a dog", "macro", "letter"),
    "micro alone": ("Both of them", "D.", "micro", "letter"),
    "another letter": ("C: three", "E", "macro", "letter"),
    "a word is no letter": ("C", "Because", "macro", "letter"),
    "empty": ("B", "", "macro", "letter"),
}


@pytest.mark.parametrize(("macro", "micro", "chosen", "reason"), LETTERS.values(), ids=LETTERS)
def test_a_valid_letter_beats_an_invalid_one(macro: str, micro: str, chosen: str, reason: str) -> None:
    pathways = Pathway(macro, 3.0, 3.0, (1,)), Pathway(micro, 2.0, 2.0, (1,))
    assert module._choice(*pathways, frozenset("ABCD")) == (chosen, reason)
    assert module._choice(*pathways, None) == ("micro", "perplexity")


def test_equal_perplexities_choose_the_micro_answer() -> None:
    """Eq. 8: macro only where it is lower."""
    pathway = Pathway("x", 2.0, 2.0, (1,))
    assert module._choice(pathway, pathway, None) == ("micro", "perplexity")


def test_letters_through_answers(model, processor) -> None:
    """Macro says "B", micro "no" with whatever perplexities: two texts of generation in turn."""
    generation = saying(["B"], ["no"])
    result = DualFocus(model, processor).answer(
        make_images(1)[0], "A or B?", letters="ab", max_new_tokens=4, **generation
    )
    assert (result.macro.text, result.micro.text) == ("B", "no")
    assert (result.chosen, result.reason) == ("macro", "letter")


# --- skipping -----------------------------------------------------------------------------------------------------


def test_confident_rows_are_skipped_and_the_others_go_on(model, processor, answers) -> None:
    perplexities = sorted(result.macro.perplexity for result in answers)
    threshold = (perplexities[0] + perplexities[1]) / 2
    method = DualFocus(model, processor, perplexity_threshold=threshold)
    results = method.answer_batch(make_images(3), QUESTIONS, **SHORT)
    for result, expected in zip(results, answers):
        assert same(result.macro, expected.macro)
        if expected.macro.perplexity < threshold:
            assert (result.reason, result.chosen, result.text) == ("confident", "macro", expected.macro.text)
            assert (result.micro, result.box, result.crop, result.grounding_text) == (None, None, None, None)
        else:
            assert same(result.micro, expected.micro)
            assert (result.box, result.crop, result.reason) == (expected.box, expected.crop, "perplexity")
    assert [result.reason for result in results].count("confident") == 1
    assert set(results[0].work) == {"macro", "box", "crop", "micro"}


def test_all_confident(model, processor, answers) -> None:
    results = DualFocus(model, processor, perplexity_threshold=1e9).answer_batch(make_images(3), QUESTIONS, **SHORT)
    assert [result.reason for result in results] == ["confident"] * 3
    work = results[0].work
    assert (work["box"].forwards, work["box"].tokens, "micro" in work) == (0, 0, False)
    assert work["macro"].forwards == SHORT["max_new_tokens"]
    assert all(same(result.macro, expected.macro) for result, expected in zip(results, answers))


def test_perplexity_is_at_least_one_so_lower_thresholds_skip_nothing(model, processor) -> None:
    result = DualFocus(model, processor, perplexity_threshold=1.0).answer(make_images(1)[0], "Why?", **SHORT)
    assert result.micro is not None


# --- boxes --------------------------------------------------------------------------------------------------------


def test_without_a_box_the_macro_answer_stands(model, processor, answers) -> None:
    """Of a batch of three, in which the second has none."""
    texts = answers[0].grounding_text, "I see no box", answers[2].grounding_text
    method = saying_boxes(model, processor, *(f" {text}" for text in texts))
    results = method.answer_batch(make_images(3), QUESTIONS, **SHORT)
    assert (results[1].reason, results[1].chosen, results[1].micro) == ("no_box", "macro", None)
    assert (results[1].box, results[1].crop, results[1].text) == (None, None, answers[1].macro.text)
    assert [result.grounding_text for result in results] == list(texts)
    for i in (0, 2):
        assert same(results[i].macro, answers[i].macro)
        assert results[i].crop == answers[i].crop


def test_a_free_box_is_the_constrained_one_where_the_model_says_it(model, processor) -> None:
    """Said token by token, with its end, and fed to the second pass as it was said."""
    given = DualFocus(model, processor).answer(make_images(1)[0], "Why?", box=(16.0, 18.0, 48.8, 43.2), **SHORT)
    for lead in ("", " "):
        free = saying_boxes(model, processor, lead + BOX).answer(make_images(1)[0], "Why?", **SHORT)
        assert free.crop == given.crop
        assert same(free.micro, given.micro) == (lead == " ")  # a prompt that ends with ":" is gone on with a space


def test_given_boxes(model, processor) -> None:
    images, boxes = make_images(3), [(10, 20.5, 30, 40), None, [(0, 0, 48, 48)]]
    for threshold in (0.0, 1.0):
        method = DualFocus(model, processor, perplexity_threshold=threshold)
        results = method.answer_batch(images, QUESTIONS, boxes=boxes, **SHORT)
        assert [result.box for result in results] == [(10, 20.5, 30, 40), None, (0, 0, 48, 48)]
        assert [result.grounding_text for result in results] == [None] * 3
        assert [result.reason for result in results] == ["perplexity", "no_box", "perplexity"]
        for i, box in ((0, boxes[0]), (2, boxes[2][0])):
            alone = DualFocus(model, processor, constrained=False).answer(images[i], QUESTIONS[i], box=box, **SHORT)
            assert same(results[i].macro, alone.macro)
            assert same(results[i].micro, alone.micro)
    none = DualFocus(model, processor).answer_batch(images, QUESTIONS, boxes=[None] * 3, **SHORT)
    assert [result.reason for result in none] == ["no_box"] * 3


def test_boxes_of_a_pixel_and_images_of_few(model, processor) -> None:
    image = make_images(1)[0]
    one = DualFocus(model, processor).answer(image, "Why?", box=(79, 59, 80, 60), **SHORT)
    assert one.crop == (54, 34, 80, 60)
    within = DualFocus(model, processor, margin=1).answer(image, "Why?", box=(40.2, 30.2, 40.4, 30.3), **SHORT)
    assert within.crop == (39, 29, 41, 31)
    dot = DualFocus(model, processor).answer(Image.new("RGB", (2, 2), "red"), "Why?", **SHORT)
    assert dot.crop == (0, 0, 2, 2)


# --- what is computed once ----------------------------------------------------------------------------------------


def test_the_work_is_counted_and_none_is_done_twice(model, processor, monkeypatch) -> None:
    """One image: the encoder sees it once and its crop once; the decoder runs its tokens once, and of the second pass
    only the box's last characters, the crop and Q2. A character is a token.
    """
    taken_back = []
    take_back, run_second, boxes = PromptTree.take_back, module.Passes.run_second, []
    monkeypatch.setattr(PromptTree, "take_back", lambda *a: taken_back.append(sum(a[2])) or take_back(*a))
    monkeypatch.setattr(module.Passes, "run_second", lambda *a: boxes.append(a[4][0]) or run_second(*a))
    with encoded(model) as images, Rows(model.model.language_model.norm) as runs:
        result = DualFocus(model, processor).answer(make_images(1)[0], "What is it?", **SHORT)
    assert [batch for batch, _ in images] == [1, 1]

    first, second = result.work["macro_and_box"], result.work["micro"]
    shared = len("^USER: \n") + GRID**2  # ^ for the one token of <s>
    q1, q2 = (len(text.replace("{question}", "What is it?") + " ASSISTANT:") for text in (BOX_PROMPT, COMBINE_PROMPT))
    box, unrun = len(boxes[0].tokens), boxes[0].num_unfed
    assert box - len(result.grounding_text) in (0, 1)  # a space before it
    assert 1 <= unrun <= len("1.00]")  # what follows the last choice waits for the second pass
    new = SHORT["max_new_tokens"] - 1  # nothing comes after the last
    assert first.tokens == shared + len("What is it? ASSISTANT:") + new + q1 + box - unrun + sum(taken_back)
    assert second.tokens == unrun + len("^USER: \n") + GRID**2 + q2 + new
    assert (first.forwards, second.forwards) == (8, SHORT["max_new_tokens"])
    assert len(runs) == first.forwards + second.forwards
    assert sum(columns for _, columns in runs) == first.tokens + second.tokens  # one row: no padding
    assert result.work["crop"].forwards == 0


def test_images_that_repeat_are_encoded_once(model, processor) -> None:
    """Two questions about one image and one about another, with one crop of each."""
    image, other = make_images(3)[1:]
    with encoded(model) as images:
        DualFocus(model, processor, margin=1).answer_batch(
            [image, image, other], QUESTIONS, boxes=[(5, 5, 9, 9)] * 3, **SHORT
        )
    assert [batch for batch, _ in images] == [2, 2]


def test_scoring_in_the_micro_context_takes_no_run_more(model, processor, answers) -> None:
    results = DualFocus(model, processor, score="micro_context").answer_batch(make_images(3), QUESTIONS, **SHORT)
    for result, expected in zip(results, answers):
        assert same(result.macro, expected.macro)
        assert same(result.micro, expected.micro)
        assert result.macro.score != pytest.approx(result.macro.perplexity)
        assert {name: work.forwards for name, work in result.work.items()} == {
            name: work.forwards for name, work in expected.work.items()
        }


def test_without_jump_forward_the_box_is_the_same(model, processor, answers) -> None:
    results = DualFocus(model, processor, jump_forward=False).answer_batch(make_images(3), QUESTIONS, **SHORT)
    for result, expected in zip(results, answers):
        assert result.grounding_text == expected.grounding_text
        assert same(result.micro, expected.micro)
    assert results[0].work["macro_and_box"].forwards == len(f" {answers[0].grounding_text}")
    assert answers[0].work["macro_and_box"].forwards <= 9


# --- generation ---------------------------------------------------------------------------------------------------


def test_eager_attention(processor, answers) -> None:
    model = make_model()
    model.set_attn_implementation("eager")
    results = DualFocus(model, processor).answer_batch(make_images(3), QUESTIONS, **SHORT)
    assert all(same(result.micro, expected.micro) for result, expected in zip(results, answers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_the_device(dtype: torch.dtype, device: str, processor, answers) -> None:
    model = make_model().to(device=device, dtype=dtype)
    results = DualFocus(model, processor).answer_batch(make_images(3), QUESTIONS, **SHORT)
    for result, expected in zip(results, answers):
        assert 1.0 <= result.perplexity < math.inf
        assert result.micro is not None
        if dtype == torch.float32:
            assert same(result.macro, expected.macro)
            assert same(result.micro, expected.micro)


def test_empty_answers_have_the_perplexity_of_their_end(model, processor) -> None:
    result = DualFocus(model, processor).answer(make_images(1)[0], "Why?", max_new_tokens=4, **saying([""], [""]))
    assert (result.text, result.macro.tokens, result.micro.tokens) == ("", (EOS,), (EOS,))
    assert 1.0 < result.perplexity < math.inf


def test_answers_of_different_lengths_end_by_themselves(model, processor) -> None:
    """Of the model's own logits, whatever was forced on it: the perplexity is that of the tokens up to the end."""
    said = ["yes", "a", "no way"], ["b", "so it is", ""]
    results = DualFocus(model, processor).answer_batch(make_images(3), QUESTIONS, max_new_tokens=9, **saying(*said))
    for i, result in enumerate(results):
        assert (result.macro.text, result.micro.text) == (said[0][i], said[1][i])
        assert (len(result.macro.tokens), len(result.micro.tokens)) == (len(said[0][i]) + 1, len(said[1][i]) + 1)
        alone = DualFocus(model, processor).answer(
            make_images(3)[i], QUESTIONS[i], max_new_tokens=9, **saying([said[0][i]], [said[1][i]])
        )
        assert same(alone.macro, result.macro)
        assert same(alone.micro, result.micro)


def test_sampling_goes_by_torchs_seed(model, processor) -> None:
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": 2.0, **SHORT}
        result = DualFocus(model, processor).answer(make_images(1)[0], "Why?", **options)
        texts.append((result.macro.text, result.micro.text))
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("score", module.SCORES)
def test_no_answer_has_an_image_token_in_it(processor, score: str) -> None:
    """However likely: run again beside the crop it would be taken for a place of it."""
    model = make_model()
    wanted = torch.zeros(model.lm_head.out_features).index_fill(0, torch.tensor([IMAGE]), 1e3)
    model.lm_head.register_forward_hook(lambda _, __, logits: logits + wanted)
    for constrained in (True, False):
        method = DualFocus(model, processor, score=score, constrained=constrained, grounding_tokens=5)
        result = method.answer(make_images(1)[0], "Why?", max_new_tokens=4)
        assert IMAGE not in result.macro.tokens
        assert (result.micro is not None) == constrained
        assert result.micro is None or IMAGE not in result.micro.tokens


def test_timings_and_kinds_of_images(model, processor, tmp_path) -> None:
    image = make_images(1)[0]
    image.save(tmp_path / "image.png")
    grey = image.convert("L")
    method = DualFocus(model, processor)
    of_file, of_image = method.answer_batch([tmp_path / "image.png", image], ["Why?"] * 2, **SHORT)
    assert same(of_file.micro, of_image.micro)
    assert method.answer(grey, "Why?", **SHORT).micro is not None
    assert list(of_image.timings) == ["encode", "macro_and_box", "crop", "micro"]
    assert all(seconds >= 0 for seconds in of_image.timings.values())


# --- the model stays what it was, and what is refused -------------------------------------------------------------


def test_the_model_is_as_it_was(processor) -> None:
    model = make_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generation = model.generation_config.to_dict()
    method = DualFocus(model, processor)
    method.answer(make_images(1)[0], "Why?", **SHORT)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Passes, "run_second", interrupted)
        with pytest.raises(KeyboardInterrupt):
            method.answer(make_images(1)[0], "Why?", **SHORT)
    assert traces(model) == []
    assert model.generation_config.to_dict() == generation
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_patched_model(processor, answers) -> None:
    model = make_model()
    with finegrain_ops.patch(model, processor):
        results = DualFocus(model, processor).answer_batch(make_images(3), QUESTIONS, **SHORT)
    assert all(same(result.micro, expected.micro) for result, expected in zip(results, answers))


def test_a_context_that_is_too_long(processor) -> None:
    """The crop does not fit any more: an error before it is run, and the model is as it was."""
    model = make_model()
    model.config.text_config.max_position_embeddings = 250
    with pytest.raises(ValueError, match=r"context: expected at most 250 positions .*, got \d+ in row 0"):
        DualFocus(model, processor).answer(make_images(1)[0], "Why?", **SHORT)
    assert traces(model) == []
    macro_alone = DualFocus(model, processor, perplexity_threshold=1e9).answer(make_images(1)[0], "Why?", **SHORT)
    assert macro_alone.reason == "confident"


def test_a_question_before_the_image_cannot_share_it(model, processor) -> None:
    method = DualFocus(model, processor, template="{question} {image} ASSISTANT:")
    with pytest.raises(UnsupportedInputError, match="template: expected the image before the question"):
        method.answer(make_images(1)[0], "Why?", **SHORT)


BAD_OPTIONS = {
    "threshold": ({"perplexity_threshold": -1.0}, ValueError, "perplexity_threshold: expected a finite number >= 0"),
    "score": ({"score": "mine"}, ValueError, "score: expected one of 'own_context', 'micro_context', got 'mine'"),
    "margin": ({"margin": 0}, ValueError, "margin: expected at least 1 pixel"),
    "prompt": ({"prompt": "Where?"}, ValueError, 'prompt: expected "{question}" in it'),
    "combine_prompt": ({"combine_prompt": 3}, TypeError, "combine_prompt: expected text"),
    "convention": ({"box_convention": "inches"}, ValueError, "box_convention: expected one of"),
    "tokens": ({"grounding_tokens": 0}, ValueError, "grounding_tokens: expected an integer > 0"),
    "greedy": ({"grounding_generation": {}}, ValueError, "grounding_generation: expected None with constrained=True"),
    "jump": ({"jump_forward": 1}, TypeError, "jump_forward: expected"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(model, processor, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message.replace("{", r"\{")):
        DualFocus(model, processor, **options)


ONE = make_images(1)
BAD_CALLS = {
    "no images": (([], []), {}, ValueError, "images: expected at least one"),
    "a bare question": ((ONE, "Why?"), {}, TypeError, "questions: expected a list"),
    "fewer questions": ((ONE * 2, ["Why?"]), {}, ValueError, "questions: expected one for each of the 2 images"),
    "an array": (([np.zeros((9, 9, 3))], ["Why?"]), {}, TypeError, r"images\[0\]: expected a Pillow image or a path"),
    "boxes of others": ((ONE, ["Why?"]), {"boxes": [None] * 2}, ValueError, "boxes: expected a list with an entry for"),
    "a box of no area": ((ONE, ["Why?"]), {"boxes": [(3, 3, 3, 9)]}, ValueError, r"boxes\[0\]"),
    "a box outside": ((ONE, ["Why?"]), {"boxes": [(90, 3, 99, 9)]}, ValueError, r"boxes\[0\]"),
    "two boxes": ((ONE, ["Why?"]), {"boxes": [[(0, 0, 9, 9)] * 2]}, ValueError, r"boxes\[0\]: expected one box"),
    "letters": ((ONE, ["Why?"]), {"letters": ["AB"]}, ValueError, "letters: expected single letters"),
    "beams": ((ONE, ["Why?"]), {"num_beams": 2}, UnsupportedInputError, "generation: expected greedy search or sampl"),
    "several": ((ONE, ["Why?"]), {"num_return_sequences": 2}, ValueError, "num_return_sequences: expected 1"),
    "a typing error": ((ONE, ["Why?"]), {"max_new_token": 2}, ValueError, "max_new_token"),
    "ours": ((ONE, ["Why?"]), {"output_logits": True}, ValueError, "output_logits: expected only settings"),
}


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(model, processor, arguments, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        DualFocus(model, processor).answer_batch(*arguments, **options)
    assert traces(model) == []


def test_models_that_are_refused(processor) -> None:
    qformer = tiny_qformer.make_model("instructblip", "llama")
    with pytest.raises(UnsupportedModelError, match="expected a model of one of"):
        DualFocus(qformer, tiny_qformer.make_processor(qformer))
    model = make_model()
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="got attn_implementation='flash_attention_2'"):
        DualFocus(model, processor)


def test_a_tokenizer_that_cannot_spell_boxes(model, processor, monkeypatch) -> None:
    alphabet = [f"<{k}>" for k in range(260)]
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "convert_ids_to_tokens", lambda self, ids: alphabet)
    with pytest.raises(
        ValueError, match=r"processor: expected a tokenizer that can write '\[0.00, 0.00, 0.01, 0.01\]'"
    ):
        DualFocus(model, make_processor())
    DualFocus(model, make_processor(), constrained=False)
