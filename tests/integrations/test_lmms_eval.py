"""The lmms-eval plug-in: what of it needs no lmms-eval, and, where that is installed, its own command line."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers.processors import TemplateProcessing

import finegrain_ops
from finegrain_ops import UnsupportedInputError, UnsupportedModelError
from finegrain_ops.integrations.lmms_eval import (
    Arguments,
    CoFEvaluation,
    PlainAnswers,
    device_of_process,
    generation_keywords,
    load,
    up_to,
)
from tiny_models import TINY

ROOT = Path(__file__).resolve().parents[2]
CHAT_TEMPLATE = (  # w80 and w81 stand for the roles
    "{{ bos_token }} w80 {% for part in messages[0].content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}w81"
)


def entry_points() -> dict[str, str]:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(requirement.startswith("lmms-eval") for requirement in project["optional-dependencies"]["eval"])
    return project["entry-points"]["lmms_eval.models"]


def test_entry_point_leads_to_the_manifest() -> None:
    assert list(entry_points()) == ["finegrain_cof"]
    module, function = entry_points()["finegrain_cof"].split(":")
    manifest = getattr(importlib.import_module(module), function)
    seen = {}
    registry = SimpleNamespace(ModelManifest=lambda **fields: seen.update(fields))
    stand_ins = {"lmms_eval": SimpleNamespace(), "lmms_eval.models": SimpleNamespace()}
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in {**stand_ins, "lmms_eval.models.registry_v2": registry}.items():
            patch.setitem(sys.modules, name, stand_in)
        manifest()
    assert seen["model_id"] == "finegrain_cof"
    package, _, class_name = seen["simple_class_path"].rpartition(".")
    source = (ROOT / "integrations" / f"{package.rpartition('.')[2]}.py").read_text()
    assert package.rpartition(".")[0] == "finegrain_ops.integrations"
    assert f"class {class_name}(lmms)" in source


# --- arguments -------------------------------------------------------------------------------------------------------


def test_arguments() -> None:
    given = Arguments.parse(
        {
            "pretrained": "llava",
            "weight": 4.5,
            "grounding": False,
            "batch_size": "8",
            "device": "cpu",
            "template": '"A chat, polite. {image} {question}"',
        },
        finegrain_ops.CoF,
    )
    assert (given.pretrained, given.batch_size, given.device, given.dtype) == ("llava", 8, "cpu", "auto")
    assert given.cof == {"weight": 4.5, "grounding": False, "template": "A chat, polite. {image} {question}"}
    assert Arguments.parse({"pretrained": "llava"}, finegrain_ops.CoF).cof == {}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"wieght": 2.0}, TypeError, "unknown argument 'wieght', did you mean 'weight'"),
        ({"zzz": 1}, TypeError, "unknown argument 'zzz'; expected some of .*attn_implementation.*weight"),
        ({"grounding_generation": "x"}, TypeError, "unknown argument 'grounding_generation'"),
        ({"pretrained": None}, TypeError, "pretrained: expected text"),
        ({"batch_size": "auto"}, ValueError, "batch_size: expected a positive integer, got str 'auto'"),
        ({"batch_size": 0}, ValueError, "batch_size: expected a positive integer"),
        ({"max_new_tokens": 2.5}, ValueError, "max_new_tokens: expected a positive integer"),
        ({"max_pixels": True}, ValueError, "max_pixels: expected a positive integer"),
        ({"dtype": "float23"}, ValueError, "dtype: expected one of auto, bfloat16"),
        ({"revision": 3}, TypeError, "revision: expected text, got int 3"),
    ],
)
def test_arguments_that_are_refused(given, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Arguments.parse({"pretrained": "llava", **given}, finegrain_ops.CoF)


def test_pretrained_must_be_given() -> None:
    with pytest.raises(TypeError, match="pretrained is missing"):
        Arguments.parse({"weight": 2.0}, finegrain_ops.CoF)


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_task", "keywords", "until", "ignored"),
    [
        ({}, {"do_sample": False, "max_new_tokens": 9}, (), []),
        (  # MME
            {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False},
            {"max_new_tokens": 16, "num_beams": 1, "do_sample": False},
            (),
            [],
        ),
        (
            {"temperature": 0.5, "top_p": 0.9, "top_k": None, "do_sample": False, "until": "\n"},
            {"temperature": 0.5, "top_p": 0.9, "do_sample": True, "max_new_tokens": 9},
            ("\n",),
            [],
        ),
        ({"do_sample": True, "top_k": 3}, {"do_sample": True, "top_k": 3, "max_new_tokens": 9}, (), []),
        (
            {"until": ["ASSISTANT:", ""], "image_aspect_ratio": "original", "max_new_token": 4},
            {"do_sample": False, "max_new_tokens": 9},
            ("ASSISTANT:",),
            ["image_aspect_ratio", "max_new_token"],
        ),
        ({"until": None}, {"do_sample": False, "max_new_tokens": 9}, (), []),
        ({"until": ["\n\n"]}, {"do_sample": False, "max_new_tokens": 9}, (), []),
    ],
)
def test_generation_keywords(of_task, keywords, until, ignored) -> None:
    assert generation_keywords(of_task, 9) == (keywords, until, ignored)


def test_until_must_be_text() -> None:
    with pytest.raises(TypeError, match="until"):
        generation_keywords({"until": [3]}, 9)


@pytest.mark.parametrize(
    ("until", "expected"), [((), "a b. c\nd"), (("x", "\n", "."), "a b"), (("\n",), "a b. c"), (("a",), "")]
)
def test_up_to(until: tuple[str, ...], expected: str) -> None:
    assert up_to("a b. c\nd", until) == expected


# --- batches ---------------------------------------------------------------------------------------------------------


class StandInCoF:
    """Answers with the question and the first pixel, and notes what it was asked."""

    def __init__(self) -> None:
        self.calls = []

    def answer_batch(self, images, questions, **generation):
        self.calls.append((questions, generation))
        assert all(image.mode == "RGB" for image in images)
        return [
            SimpleNamespace(
                text=f"{question} {image.getpixel((0, 0))[0]} STOP more",
                box=(0.0, 0.0, 2.0, 1.0) if "box" in question else None,
                grounding_text="a box",
                perplexity=1.5,
            )
            for image, question in zip(images, questions)
        ]


def image(shade: int, mode: str = "RGB") -> Image.Image:
    return Image.new("L", (4, 3), shade).convert(mode)


class Requests:
    """lmms-eval's requests, and the documents that they lead to."""

    def __init__(self) -> None:
        self.documents, self.requests = {}, []

    def add(self, question: str, visuals, task: str = "one", **generation) -> None:
        of_split = self.documents.setdefault(task, {"test": []})["test"]
        of_split.append(visuals)
        arguments = (question, generation, lambda doc: doc, len(of_split) - 1, task, "test")
        self.requests.append(SimpleNamespace(args=arguments))


def evaluation(cof, answer_plainly=None, **options):
    lines = SimpleNamespace(debug=[], warn=[])
    made = CoFEvaluation(cof, answer_plainly, debug=lines.debug.append, warn=lines.warn.append, **options)
    return made, lines


def test_batches_and_order() -> None:
    asked = Requests()
    asked.add("short", [image(1)], until=["STOP"], max_new_tokens=4)
    asked.add("of another task, box", [image(2, "L")], task="two", until=["STOP"], max_new_tokens=4)
    asked.add("sampled", [image(3)], temperature=0.5)
    asked.add("the longest of all <image>", [image(4, "RGBA")], until=["STOP"], max_new_tokens=4)
    cof = StandInCoF()
    made, lines = evaluation(cof, batch_size=2)
    answers = made.answer(asked.requests, asked.documents, show_progress=False)
    assert answers == [
        "short 1 ",
        "of another task, box 2 ",
        "sampled 3 STOP more",
        "the longest of all 4 ",
    ]
    greedy = {"do_sample": False, "max_new_tokens": 4}
    assert cof.calls == [
        (["the longest of all", "of another task, box"], greedy),
        (["short"], greedy),
        (["sampled"], {"do_sample": True, "temperature": 0.5, "max_new_tokens": 1024}),
    ]
    assert made.counts == {"box": 1, "no_box": 3, "no_image": 0, "several_images": 0}
    assert json.loads(lines.debug[1].removeprefix("finegrain_cof: ")) == {
        "task": "two",
        "doc_id": 0,
        "box": [0.0, 0.0, 2.0, 1.0],
        "grounding_text": "a box",
        "text": "of another task, box 2 STOP more",
        "perplexity": 1.5,
    }
    assert not lines.warn


def test_questions_about_no_image_or_several_are_answered_plainly() -> None:
    asked = Requests()
    asked.add("none", [])
    asked.add("one", [image(7)])
    asked.add("two <image> <image>", [image(8), image(9)])
    asked.add("nothing at all", None)
    plain = []

    def answer_plainly(images, question, **generation):
        plain.append((len(images), question, generation["max_new_tokens"]))
        return "plainly"

    cof = StandInCoF()
    made, _ = evaluation(cof, answer_plainly, batch_size=4, max_new_tokens=3)
    answers = made.answer(asked.requests, asked.documents, show_progress=False)
    assert answers == ["plainly", "one 7 STOP more", "plainly", "plainly"]
    assert sorted(plain) == [(0, "none", 3), (0, "nothing at all", 3), (2, "two <image> <image>", 3)]
    assert [questions for questions, _ in cof.calls] == [["one"]]
    assert made.counts == {"box": 0, "no_box": 1, "no_image": 2, "several_images": 1}


def test_what_generate_does_not_know_is_warned_of_once() -> None:
    asked = Requests()
    for _ in range(3):
        asked.add("question", [image(1)], image_aspect_ratio="original")
    made, lines = evaluation(StandInCoF())
    made.answer(asked.requests, asked.documents, show_progress=False)
    assert lines.warn == ["finegrain_cof: generation_kwargs of task one: image_aspect_ratio is ignored"]


def test_video_is_refused() -> None:
    asked = Requests()
    asked.add("question", ["video.mp4"])
    made, _ = evaluation(StandInCoF())
    with pytest.raises(UnsupportedInputError, match=r"task one to give PIL images, got str 'video\.mp4'"):
        made.answer(asked.requests, asked.documents, show_progress=False)


def test_every_process_has_a_gpu_of_its_own(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert device_of_process("cuda") == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [device_of_process(device) for device in (None, "cuda", "cuda:1", "cpu")] == ["cuda:3"] * 2 + [
        "cuda:1",
        "cpu",
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of_process(None) == "cpu"


# --- a tiny LLaVA ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    TINY["LLaVA-1.5"].make_model().save_pretrained(folder)
    TINY["LLaVA-1.5"].make_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava(checkpoint: Path):
    """Its tokenizer puts <s> before a text, as LLaVA's does."""
    model, processor = load(Arguments(str(checkpoint), device="cpu"))
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", processor.tokenizer.bos_token_id)]
    )
    return model, processor


def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (40, 30 + 9 * i, 3), dtype=np.uint8)) for i in range(3)]


def test_load(checkpoint: Path) -> None:
    given = Arguments(str(checkpoint), device="cpu", dtype="bfloat16", attn_implementation="eager")
    model, processor = load(given)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert (model.dtype, model.device.type, model.training) == (torch.bfloat16, "cpu", False)
    assert model.config.text_config._attn_implementation == "eager"
    assert type(processor).__name__ == "LlavaProcessor"


def test_load_refuses(checkpoint: Path, tmp_path: Path) -> None:
    transformers.BertConfig().save_pretrained(tmp_path)  # without any weights
    with pytest.raises(UnsupportedModelError, match="model_type 'bert'"):
        load(Arguments(str(tmp_path), device="cpu"))
    with pytest.raises(ValueError, match=r"max_pixels: CLIPImageProcessor.* has no such limits"):
        load(Arguments(str(checkpoint), device="cpu", max_pixels=4096))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("num_images", "question", "in_prompt"),
    [
        (0, "w10 w11", "w10 w11"),
        (2, "w10 w11", "<image> <image> w10 w11"),
        (2, "w10 <image> w11 <image>", "w10 <image> w11 <image>"),
        (1, "w10 <image> <image> w11", "<image> w10   w11"),  # which of the two would it be?
    ],
)
def test_plain_answers(llava, chat: bool, num_images: int, question: str, in_prompt: str) -> None:
    model, processor = llava
    images = pictures()[:num_images]
    text = f"<s> w80 {in_prompt} w81" if chat else f"USER: {in_prompt} ASSISTANT:"
    special = {"add_special_tokens": not chat, "return_tensors": "pt"}
    inputs = processor(images=images, text=text, **special) if images else processor.tokenizer(text, **special)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=5)
    expected = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "chat_template", CHAT_TEMPLATE if chat else None)
        actual = PlainAnswers(model, processor)(images, question, do_sample=False, max_new_tokens=5)
    assert actual == expected


def test_plain_answers_of_a_q_former_are_refused() -> None:
    model = SimpleNamespace(config=SimpleNamespace(model_type="instructblip", qformer_config=object()))
    processor = SimpleNamespace(image_processor=object(), tokenizer=SimpleNamespace(bos_token=None))
    with pytest.raises(UnsupportedInputError, match="takes exactly one image, got a question about 2"):
        PlainAnswers(model, processor)(pictures()[:2], "question")


def test_one_image_is_answered_by_cof(llava) -> None:
    """With CoF itself: the answers in order, and that a weight changes them."""
    model, processor = llava
    asked = Requests()
    for i, picture in enumerate(pictures()):
        asked.add(" ".join(f"w{10 + 7 * i + k}" for k in range(i + 1)), [picture], max_new_tokens=5, temperature=0)
    answers = {}
    for weight in (1.0, 40.0):
        cof = finegrain_ops.CoF(model, processor, weight=weight, grounding_tokens=3)
        made, _ = evaluation(cof, batch_size=2)
        answers[weight] = made.answer(asked.requests, asked.documents, show_progress=False)
        alone = [
            cof.answer(r.args[2](asked.documents["one"]["test"][i])[0], r.args[0], max_new_tokens=5).text
            for i, r in enumerate(asked.requests)
        ]
        assert answers[weight] == alone
    assert answers[1.0] != answers[40.0]


# --- lmms-eval's own command line ------------------------------------------------------------------------------------

TASK = """\
task: finegrain_local
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function local_task.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: 5
  temperature: 0
  until: []
process_results: !function local_task.results
metric_list:
  - metric: words
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """\
def visual(doc):
    return [doc["image"]]


def results(doc, answers):
    return {"words": float(len(answers[0].split()))}
"""


def run(folder: Path, *arguments: str) -> str:
    """A process of its own, where our metadata is what pyproject.toml says, whatever is installed."""
    metadata = folder / "finegrain_ops-0.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: finegrain-ops\nVersion: 0\n")
    lines = [f"{name} = {where}" for name, where in entry_points().items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[lmms_eval.models]", *lines, ""]))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def lmms_eval() -> None:
    if importlib.util.find_spec("lmms_eval") is None:
        pytest.skip("lmms-eval is not installed")


def test_registry_finds_the_model_and_refuses_a_misspelt_argument(lmms_eval, tmp_path: Path) -> None:
    code = (
        "from lmms_eval import models\n"
        "model = models.get_model('finegrain_cof')\n"
        "print(model.__mro__[1])\n"
        "try: model.create_from_arg_string('pretrained=x,wieght=2.0', {'batch_size': '8', 'device': 'cpu'})\n"
        "except TypeError as error: print(error)\n"
    )
    printed = run(tmp_path, "-c", code)
    assert "<class 'lmms_eval.api.model.lmms'>" in printed
    assert "unknown argument 'wieght', did you mean 'weight'?" in printed


def test_command_line(lmms_eval, checkpoint: Path, tmp_path: Path) -> None:
    datasets = importlib.import_module("datasets")
    documents = [
        {"image": picture, "question": f"w{20 + 5 * i} w11", "answer": "w12"} for i, picture in enumerate(pictures())
    ]
    features = {"image": datasets.Image(), **dict.fromkeys(["question", "answer"], datasets.Value("string"))}
    data = tmp_path / "data.parquet"
    datasets.Dataset.from_list(documents, features=datasets.Features(features)).to_parquet(data)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "finegrain_local.yaml").write_text(TASK.format(data=data))
    (tasks / "local_task.py").write_text(FUNCTIONS)
    options = {"weight": 40.0, "expand": 1.5, "grounding": False}
    model_args = ",".join(f"{name}={value}" for name, value in {"pretrained": checkpoint, **options}.items())
    command = ["-m", "lmms_eval", "--model", "finegrain_cof", "--model_args", model_args, "--device", "cpu"]
    command += ["--include_path", str(tasks), "--tasks", "finegrain_local", "--batch_size", "2", "--log_samples"]
    printed = run(tmp_path, *command, "--output_path", str(tmp_path / "out"), "--verbosity", "DEBUG")
    assert printed.count('"grounding_text": null') == len(documents)
    (samples,) = (tmp_path / "out").rglob("*_samples_finegrain_local.jsonl")
    answers = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    cof = finegrain_ops.CoF(*load(Arguments(str(checkpoint), device="cpu")), **options)
    assert answers == [cof.answer(doc["image"], doc["question"], max_new_tokens=5).text for doc in documents]
    (results,) = (tmp_path / "out").rglob("*_results.json")
    assert json.loads(results.read_text())["throughput"]["avg_answers_no_box"] == len(documents)
