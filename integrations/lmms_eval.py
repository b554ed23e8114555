"""`lmms_eval --model finegrain_cof`: any supported checkpoint answers the benchmarks of lmms-eval by CoF.

lmms-eval (0.6 or later, the PyPI package) finds `manifest` through the entry point of the group "lmms_eval.models" and
loads the class in lmms_eval_model.py. What that class does is here, where it needs no lmms-eval: the arguments of
`--model_args`, batches, generation keywords, answers. docs/lmms_eval.md says how to use it.
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from tqdm import tqdm

from ..errors import UnsupportedInputError, UnsupportedModelError
from ..methods.generation import generate_answers
from ..methods.prompting import IMAGE, PLAIN_FORMATS, QUESTION, Prompter
from ..validation import describe
from .family import FAMILIES

MODEL_NAME = "finegrain_cof"
PLACEHOLDER = "<image>"  # what tasks write in a question where an image belongs, whatever the model's own token is

# Keywords of transformers' `generate` that tasks use. Whatever else a task or --gen_kwargs holds is meant for other
# models (image_aspect_ratio, for LLaVA's own code) or misspelt: both are warned of, and ignored.
GENERATION_KEYWORDS = frozenset(
    {
        "do_sample",
        "length_penalty",
        "max_new_tokens",
        "min_new_tokens",
        "no_repeat_ngram_size",
        "num_beams",
        "repetition_penalty",
        "temperature",
        "top_k",
        "top_p",
    }
)
_BLANK_LINE = "\n\n"  # the `until` of a task that has none: lmms-eval's own models let no answer end there either
_SAMPLING_KEYWORDS = frozenset({"temperature", "top_k", "top_p"})


def manifest() -> Any:
    """What the entry point gives to lmms-eval: the name of the model and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_NAME, simple_class_path=f"{__package__}.lmms_eval_model.FinegrainCoF")


@dataclass(frozen=True)
class Arguments:
    """`--model_args`, and --batch_size and --device, which lmms-eval adds to them. `parse` makes them."""

    pretrained: str  # name on the hub, or a folder
    revision: str = "main"
    device: str | None = None  # None: cuda where there is one, else cpu
    dtype: str = "auto"
    attn_implementation: str | None = None
    batch_size: int = 1
    max_new_tokens: int = 1024  # where the task does not say
    min_pixels: int | None = None  # of the Qwen families' image processors
    max_pixels: int | None = None
    preset: str | None = None  # of CoF.from_preset
    cof: Mapping[str, Any] = field(default_factory=dict)  # the keywords of CoF, as given

    @classmethod
    def parse(cls, given: Mapping[str, Any], cof_type: type) -> Arguments:
        """Sorts what lmms-eval read into this plug-in's own arguments and the keywords of `cof_type`.

        Raises:
            TypeError: an argument has an unknown name, is missing, or has another type.
            ValueError: batch_size or max_new_tokens is not a positive integer.
        """
        own = {f.name: f for f in fields(cls) if f.name != "cof"}
        parameters = inspect.signature(cof_type.__init__).parameters.items()
        of_cof = [name for name, p in parameters if p.kind is p.KEYWORD_ONLY and name not in _NOT_TEXT]
        unknown = [name for name in given if name not in own and name not in of_cof]
        if unknown:
            known = [*own, *of_cof]
            similar = difflib.get_close_matches(unknown[0], known, 1)
            raise TypeError(
                f"model_args: unknown argument {unknown[0]!r}"
                + (f", did you mean {similar[0]!r}? " if similar else "; ")
                + f"expected some of {', '.join(sorted(known))}"
            )
        missing = [name for name, f in own.items() if f.default is MISSING and name not in given]
        if missing:
            raise TypeError(f"model_args: {missing[0]} is missing; pass --model_args {missing[0]}=...")
        values = {name: _checked(name, _unquoted(value)) for name, value in given.items() if name in own}
        return cls(**values, cof={name: _unquoted(value) for name, value in given.items() if name in of_cof})


_NOT_TEXT = ("grounding_generation",)  # a keyword of CoF that no key=value can give
_DTYPES = ("auto", "bfloat16", "float16", "float32")
_COUNTS = ("batch_size", "max_new_tokens", "min_pixels", "max_pixels")


def _unquoted(value: Any) -> Any:
    """lmms-eval leaves the quotes that keep a text with commas together."""
    is_quoted = isinstance(value, str) and len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if is_quoted else value


def _checked(name: str, value: Any) -> Any:
    if name in _COUNTS:
        if isinstance(value, str) and value.isdecimal():  # --batch_size comes as text
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {describe(value)}")
        return value
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected text, got {describe(value)}")
    if name == "dtype" and value not in _DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {value!r}")
    return value


def generation_keywords(
    task_keywords: Mapping[str, Any], max_new_tokens: int
) -> tuple[dict[str, Any], tuple[str, ...], list[str]]:
    """What a task's generation_kwargs mean for `generate`, as lmms-eval's own models read them: temperature, where it
    is given, says whether to sample.

    Returns:
        (keywords of generate, the strings that end the answer, the names that were ignored)
    """
    until = task_keywords.get("until") or ()
    if isinstance(until, str):
        until = (until,)
    if not isinstance(until, (list, tuple)) or not all(isinstance(stop, str) for stop in until):
        raise TypeError(f"generation_kwargs: expected until to be text or a list of texts, got {describe(until)}")
    ignored = [name for name in task_keywords if name != "until" and name not in GENERATION_KEYWORDS]
    keywords = {name: task_keywords[name] for name in task_keywords if name in GENERATION_KEYWORDS}
    keywords = {name: value for name, value in keywords.items() if value is not None}
    if "temperature" in keywords:
        keywords["do_sample"] = keywords["temperature"] > 0
    keywords.setdefault("do_sample", False)
    if not keywords["do_sample"]:
        keywords = {name: value for name, value in keywords.items() if name not in _SAMPLING_KEYWORDS}
    keywords.setdefault("max_new_tokens", max_new_tokens)
    return keywords, tuple(stop for stop in until if stop not in ("", _BLANK_LINE)), ignored


def up_to(text: str, until: Sequence[str]) -> str:
    """`text` before the first of the strings that end it."""
    return text[: min((at for at in map(text.find, until) if at >= 0), default=len(text))]


class CoFEvaluation:
    """Answers lmms-eval's generate_until requests: those with one image by CoF, the others plainly.

    Args:
        cof: has answer_batch(images, questions, **generation), as `finegrain_ops.CoF`.
        answer_plainly: (images, question, **generation) -> text, for no image and for several, where CoF is not
            defined.
        batch_size: images in one call of answer_batch.
        max_new_tokens: where the task does not say.
        debug, warn: take one line of text each.
    """

    def __init__(
        self,
        cof: Any,
        answer_plainly: Callable[..., str],
        *,
        batch_size: int = 1,
        max_new_tokens: int = 1024,
        debug: Callable[[str], object],
        warn: Callable[[str], object],
    ) -> None:
        self.cof, self.answer_plainly = cof, answer_plainly
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.debug, self.warn = debug, warn
        self.counts = Counter(box=0, no_box=0, no_image=0, several_images=0)  # answers of each kind so far
        self._warned: set[str] = set()

    def answer(self, requests: Sequence[Any], documents: Mapping[str, Any], show_progress: bool = True) -> list[str]:
        """The answers to `requests`, in their order.

        Args:
            requests: lmms-eval's instances; .args is (context, generation_kwargs, doc_to_visual, doc_id, task, split).
            documents: documents[task][split][doc_id], lmms-eval's task_dict.

        Raises:
            UnsupportedInputError: a document shows something else than images.
        """
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc=MODEL_NAME, disable=not show_progress) as progress:
            for indices in self._batches(requests):
                keywords, until = self._generation(requests[indices[0]])
                for i, text in self._answer_batch(indices, requests, documents, keywords):
                    answers[i] = up_to(text, until)
                progress.update(len(indices))
        return answers

    def _batches(self, requests: Sequence[Any]) -> Iterator[list[int]]:
        """Indices of requests with the same generation_kwargs, long questions first: what does not fit into memory
        says so at once, and little is spent on padding.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        for indices in groups.values():
            indices.sort(key=lambda i: -len(requests[i].args[0]))
            for first in range(0, len(indices), self.batch_size):
                yield indices[first : first + self.batch_size]

    def _generation(self, request: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
        keywords, until, ignored = generation_keywords(request.args[1], self.max_new_tokens)
        for name in ignored:
            if name not in self._warned:
                self._warned.add(name)
                self.warn(f"{MODEL_NAME}: generation_kwargs of task {request.args[4]}: {name} is ignored")
        return keywords, until

    def _answer_batch(
        self, indices: list[int], requests: Sequence[Any], documents: Mapping[str, Any], keywords: dict[str, Any]
    ) -> Iterator[tuple[int, str]]:
        with_one_image = []
        for i in indices:
            question, _, doc_to_visual, doc_id, task, split = requests[i].args
            images = _images(doc_to_visual(documents[task][split][doc_id]), task)
            if len(images) == 1:
                with_one_image.append((i, images[0], question.replace(PLACEHOLDER, "").strip()))
            else:
                self.counts["several_images" if images else "no_image"] += 1
                yield i, self.answer_plainly(images, question, **keywords)
        if with_one_image:
            of_request, images, questions = zip(*with_one_image)
            for i, result in zip(of_request, self.cof.answer_batch(list(images), list(questions), **keywords)):
                self.counts["no_box" if result.box is None else "box"] += 1
                self.debug(f"{MODEL_NAME}: {json.dumps(_record(requests[i], result), default=str)}")
                yield i, result.text


class PlainAnswers:
    """The model's answers without CoF, to a question about no image or about several.

    A question with as many "<image>" in it as there are images has each in its place; otherwise they all come first.

    Args:
        template: as CoF's, where it is text.

    Raises:
        UnsupportedInputError: the model takes exactly one image (InstructBLIP, BLIP-2).
    """

    def __init__(self, model: Any, processor: Any, template: str | None = None) -> None:
        self._model, self._processor = model, processor
        self._prompter = Prompter(model, processor, template)
        if template is None and getattr(processor, "chat_template", None) is None:
            template = PLAIN_FORMATS[model.config.model_type]
        self._template = template

    def __call__(self, images: Sequence[Any], question: str, **generation: Any) -> str:
        if hasattr(self._model.config, "qformer_config"):
            raise UnsupportedInputError(
                f"{MODEL_NAME}: {type(self._model).__name__} takes exactly one image, got a question about "
                f"{len(images)}; choose tasks whose questions are about one image each"
            )
        text = self._prompt(len(images), question)
        if images:
            (inputs,) = self._prompter.encode(images, [text])
        else:
            inputs = self._tokens(text)
        return generate_answers(self._model, inputs, self._prompter.decode, generation).texts[0]

    def _prompt(self, num_images: int, question: str) -> str:
        parts = question.split(PLACEHOLDER)
        if len(parts) != num_images + 1:
            text = "".join(parts)
            parts = ["", *["\n"] * (num_images - 1), f"\n{text}"] if num_images else [text]
        if self._template is not None:
            text = str(getattr(self._processor, "image_token", PLACEHOLDER)).join(parts).strip()
            return self._template.replace(IMAGE + "\n", "").replace(IMAGE, "").replace(QUESTION, text)
        content: list[dict[str, str]] = []
        for i, part in enumerate(map(str.strip, parts)):
            content += [{"type": "image"}] * (i > 0) + [{"type": "text", "text": part}] * bool(part)
        chat = [{"role": "user", "content": content}]
        return str(self._processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))

    def _tokens(self, text: str) -> dict[str, Any]:
        tokenizer = self._prompter.tokenizer
        has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        tokens = tokenizer([text], add_special_tokens=not has_bos, return_tensors="pt")
        return {name: tokens[name].to(self._model.device) for name in ("input_ids", "attention_mask")}


def load(given: Arguments) -> tuple[Any, Any]:
    """(model, processor), the model on its device and in inference mode.

    Raises:
        UnsupportedModelError: CoF cannot patch models of this type; said before the weights are read.
        ValueError: min_pixels or max_pixels for a processor without such limits.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    where = {"revision": given.revision}
    model_type = AutoConfig.from_pretrained(given.pretrained, **where).model_type
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"pretrained: expected a checkpoint of one of the families {sorted(FAMILIES)}, got {given.pretrained!r} "
            f"with model_type {model_type!r}"
        )
    limits = {name: getattr(given, name) for name in ("min_pixels", "max_pixels") if getattr(given, name) is not None}
    processor = AutoProcessor.from_pretrained(given.pretrained, **where, **limits)
    if limits and not hasattr(processor.image_processor, "merge_size"):
        raise ValueError(
            f"{', '.join(limits)}: {type(processor.image_processor).__name__} has no such limits, only those of the "
            "Qwen families have; leave them out"
        )
    model = AutoModelForImageTextToText.from_pretrained(
        given.pretrained, **where, dtype=given.dtype, attn_implementation=given.attn_implementation
    )
    return model.to(device_of_process(given.device)), processor


def device_of_process(device: str | None) -> str:
    """Where several processes share the work, "cuda" is for each a GPU of its own."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device


def _images(visuals: Any, task: str) -> list[Any]:
    """The RGB images among which a document's question is asked; None and [] are none."""
    from PIL import Image

    visuals = [visual for visual in visuals or () if visual is not None]
    for visual in visuals:
        if not isinstance(visual, Image.Image):
            raise UnsupportedInputError(
                f"{MODEL_NAME}: expected doc_to_visual of task {task} to give PIL images, got {describe(visual)}; "
                "tasks with video or audio are not supported"
            )
    return [visual.convert("RGB") for visual in visuals]


def _record(request: Any, result: Any) -> dict[str, Any]:
    """What --verbosity DEBUG shows of one answer."""
    _, _, _, doc_id, task, _ = request.args
    return {
        "task": task,
        "doc_id": doc_id,
        "box": result.box,
        "grounding_text": result.grounding_text,
        "text": result.text,
        "perplexity": result.perplexity,
    }
