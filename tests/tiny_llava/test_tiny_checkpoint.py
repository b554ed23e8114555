"""A checkpoint of the small model: what was saved is loaded, by this package and by transformers; a file that is
missing or damaged is named.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from finegrain_ops.tiny_llava import checkpoint
from finegrain_ops.tiny_llava.checkpoint import FACTS, CheckpointError, facts_of, load, save
from finegrain_ops.tiny_llava.model import new_model
from finegrain_ops.tiny_llava.tokenizer import make_processor, make_tokenizer
from packed_conversations import logits_of

WEIGHTS_FILE = "model.safetensors"
TEXT = "USER: <image>\nWhat colour is the leftmost card? ASSISTANT: [0.20, 0.41, 0.37, 0.74]</s>"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Another model than the one of the other tests."""
    folder = tmp_path_factory.mktemp("checkpoint") / "new"
    save(new_model(5), make_processor(make_tokenizer()), folder, {"seed": 5, "minutes": 1.5, "validation": {"a": 1}})
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def inputs_of(processor):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (130, 90, 3), np.uint8))
    return dict(processor(images=[image], text=TEXT, return_tensors="pt"))


def same_inputs(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- what was saved ---


def test_weights_come_back_in_float16s_precision(saved) -> None:
    model, _ = load(saved)
    weights, expected = model.state_dict(), new_model(5).state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert weights[name].dtype == (torch.float32 if weight.is_floating_point() else weight.dtype)
        assert torch.equal(weights[name], weight.half().to(weight.dtype)), name
    assert not model.training
    size = (saved / WEIGHTS_FILE).stat().st_size
    assert size < 2.1 * sum(weight.numel() for weight in expected.values())  # bytes


def test_saving_changes_nothing_of_the_model(tmp_path) -> None:
    model = new_model(6)
    save(model, make_processor(make_tokenizer()), tmp_path / "a" / "b", {})
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in new_model(6).state_dict().items())
    assert model.training
    assert model.dtype == torch.float32
    load(str(tmp_path / "a" / "b"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_another_precision(dtype: torch.dtype, saved) -> None:
    model, _ = load(saved, dtype=dtype)
    assert {weight.dtype for weight in model.parameters()} == {dtype}


def test_the_processor_comes_back(saved) -> None:
    _, processor = load(saved)
    assert same_inputs(inputs_of(processor), inputs_of(make_processor(make_tokenizer())))


def test_transformers_loads_it_alone(saved) -> None:
    model, processor = load(saved)
    alone = LlavaForConditionalGeneration.from_pretrained(saved, dtype=torch.float32).eval()
    try:
        its_processor = AutoProcessor.from_pretrained(saved)
    except ImportError as error:
        pytest.skip(f"AutoProcessor wants more: {error}")
    inputs = inputs_of(its_processor)
    expected = inputs_of(processor)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    torch.testing.assert_close(inputs["pixel_values"], expected["pixel_values"], atol=0.05, rtol=0)
    assert torch.equal(logits_of(alone, expected), logits_of(model, expected))


def test_weights_have_the_names_of_released_checkpoints(saved) -> None:
    """Which transformers 4 and 5 both read."""
    weights = load_file(saved / WEIGHTS_FILE)
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    beginnings = ("vision_tower.vision_model.", "multi_modal_projector.linear_", "language_model.model.")
    assert {name for name in weights if not name.startswith(beginnings)} == {"language_model.lm_head.weight"}
    assert "vision_tower.vision_model.embeddings.class_embedding" in weights
    assert "language_model.model.embed_tokens.weight" in weights


def test_the_tokenizers_settings_are_those_that_transformers_4_knows(saved) -> None:
    settings = json.loads((saved / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<image>"]
    assert not settings.keys() & {"backend", "extra_special_tokens"}


def test_facts(saved) -> None:
    facts = facts_of(saved)
    assert {name: facts[name] for name in ("seed", "minutes", "validation")} == {
        "seed": 5,
        "minutes": 1.5,
        "validation": {"a": 1},
    }
    assert json.loads((saved / FACTS).read_text()) == facts
    assert facts_of(str(saved)) == facts


# --- what is not ---

FILES = (WEIGHTS_FILE, "config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json")
FILES += ("preprocessor_config.json", "generation_config.json")
ALL_AGAIN = r"install finegrain_ops again"


@pytest.fixture
def transformers_is_not_reached(monkeypatch) -> None:
    """It would make LLaVA-7B where config.json is missing."""

    def refuse(*args, **options):
        raise AssertionError("a damaged checkpoint went to transformers")

    monkeypatch.setattr(checkpoint.LlavaForConditionalGeneration, "from_pretrained", refuse)
    monkeypatch.setattr(checkpoint.PreTrainedTokenizerFast, "from_pretrained", refuse)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    return str(caught.value)


def test_all_files_are_among_the_damaged(saved) -> None:
    written = {path.name for path in saved.iterdir()} - {FACTS}
    assert set(FILES) <= written <= {*FILES, "special_tokens_map.json"}


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(name: str, copy, transformers_is_not_reached) -> None:
    (copy / name).unlink()
    assert re.match(rf"{re.escape(str(copy / name))}: expected a file .*{ALL_AGAIN}, or train it with", refusal(copy))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["a bit", "cut off", "empty", "longer"])
def test_a_damaged_file(name: str, damage: str, copy, transformers_is_not_reached) -> None:
    content = bytearray((copy / name).read_bytes())
    if damage == "a bit":
        content[len(content) // 2] ^= 4
    else:
        content = {"cut off": content[:-10], "empty": b"", "longer": content + b" "}[damage]
    (copy / name).write_bytes(content)
    message = refusal(copy)
    assert re.match(rf"{re.escape(str(copy / name))}: expected the file with the SHA-256 [0-9a-f]{{64}}, got", message)
    assert re.search(ALL_AGAIN, message)


def test_a_missing_folder(tmp_path, transformers_is_not_reached) -> None:
    message = refusal(tmp_path / "nowhere")
    assert message.startswith(f"{tmp_path / 'nowhere' / FACTS}: expected a file")
    assert re.search(ALL_AGAIN, message)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "nowhere" / FACTS))):
        facts_of(tmp_path / "nowhere")


BROKEN = {
    "missing": None,
    "empty": b"",
    "cut off": b'{"sha256": {"model.saf',
    "no text": b"\xff\xfe\x00",
    "null": b"null",
    "a number": b"3",
    "text": b'"sha256"',
    "a list": b"[1, 2]",
    "no digests": b'{"seed": 0}',
    "one digest": b'{"sha256": "0123456789abcdef"}',
    "no digest of the weights": b'{"sha256": {"config.json": "0"}}',
    "digests in a list": b'{"sha256": ["model.safetensors"]}',
}


@pytest.mark.parametrize("broken", list(BROKEN))
def test_broken_facts(broken: str, copy, transformers_is_not_reached) -> None:
    if BROKEN[broken] is None:
        (copy / FACTS).unlink()
    else:
        (copy / FACTS).write_bytes(BROKEN[broken])
    message = refusal(copy)
    assert message.startswith(f"{copy / FACTS}: expected ")
    assert re.search(ALL_AGAIN, message)
    with pytest.raises(CheckpointError, match=re.escape(str(copy / FACTS))):
        facts_of(copy)


@pytest.mark.parametrize("other", ["no JSON", "a weight less", "a weight more"])
def test_another_checkpoint(other: str, copy) -> None:
    """Whole, as far as digests say, but not of a model as this one: what transformers says is passed on."""
    if other == "no JSON":
        (copy / "config.json").write_text("{")
    else:
        weights = load_file(copy / WEIGHTS_FILE)
        weights["of_another.weight"] = torch.zeros(3)
        if other == "a weight less":
            weights = {name: weight for name, weight in weights.items() if "linear_1.bias" not in name}
            weights.pop("of_another.weight")
        save_file(weights, copy / WEIGHTS_FILE, metadata={"format": "pt"})
    facts = facts_of(copy)
    facts["sha256"] = {name: hashlib.sha256((copy / name).read_bytes()).hexdigest() for name in facts["sha256"]}
    (copy / FACTS).write_text(json.dumps(facts))
    message = refusal(copy)
    assert message.startswith(f"{copy}: expected a checkpoint of the small LLaVA, ")
    assert {"no JSON": "config.json", "a weight less": "linear_1.bias", "a weight more": "of_another"}[other] in message


def test_a_checkpoint_error_is_a_runtime_error() -> None:
    assert issubclass(CheckpointError, RuntimeError)
