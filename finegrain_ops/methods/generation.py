"""One call of `generate` for a batch: the answers as text, and how sure the model was of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .perplexity import answer_mask, new_tokens, perplexity
from .reuse import ImagePrefix

GREEDY = {"do_sample": False, "num_beams": 1}

_OURS = ("return_dict_in_generate", "output_logits", "key_bias", "row_gate", "input_ids", "inputs_embeds")
# Models that let an inner model generate, whose settings hold.
_LANGUAGE_MODEL_GENERATES = ("instructblip", "blip-2")


@dataclass(frozen=True)
class Answers:
    """Of one batch, a row for each prompt."""

    texts: list[str]
    perplexities: list[float]


def generate_answers(
    model: Any,
    inputs: Mapping[str, Any],
    decode: Callable[[Tensor], str],
    generation: Mapping[str, Any],
    defaults: Mapping[str, Any] = GREEDY,
    *,
    patched: Mapping[str, Any] | None = None,
    prefix: ImagePrefix | None = None,
) -> Answers:
    """Generates with every setting of `generation`, and those of `defaults` that it leaves open.

    Every step's logits are kept until the end, in float32, for the perplexities: rows x vocabulary x 4 bytes each.

    Args:
        inputs: of the model, from `Prompter.encode`.
        decode: turns one answer's tokens into text.
        generation: see `check_generation`.
        patched: key_bias and row_gate of a patched model.
        prefix: what was computed of these inputs already.
    """
    settings = with_defaults(generation, defaults)
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    config = settings.get("generation_config")
    if config is None:
        settings |= wanted
    else:  # transformers wants all settings in it, or none
        settings["generation_config"] = config = copy.deepcopy(config)
        config.update(**wanted)
    settings |= patched or {}
    output = model.generate(**inputs, **settings) if prefix is None else prefix.generate(inputs, **settings)
    beams = getattr(output, "beam_indices", None)
    tokens = new_tokens(output.sequences, len(output.logits), beams)
    end = end_tokens(model, generation)
    mask = answer_mask(tokens, **end)
    return Answers(
        [decode(row[kept]) for row, kept in zip(tokens, mask)],
        perplexity(tokens, output.logits, beam_indices=beams, **end).tolist(),
    )


def check_generation(generation: Mapping[str, Any]) -> None:
    """Refuses the settings that the methods make themselves, and several answers to a question.

    Raises:
        ValueError: names the setting.
    """
    for name in _OURS:
        if name in generation:
            raise ValueError(f"{name}: expected only settings of generation, but {name} is made here; leave it out")
    if setting(generation, "num_return_sequences", 1) != 1:
        raise ValueError("num_return_sequences: expected 1, one answer to each question; ask the question repeatedly")


def grounding_settings(generation: Mapping[str, Any] | None, *, constrained: bool) -> dict[str, Any]:
    """Those of the `generate` that writes a box; none where the box is constrained.

    Raises:
        ValueError: there are some all the same; or see `check_generation`.
    """
    if generation is not None and constrained:
        raise ValueError("grounding_generation: expected None with constrained=True, which is greedy; leave it out")
    settings = dict(generation or {})
    check_generation(settings)
    return settings


def with_defaults(generation: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A generation_config says everything, so with one no default applies; max_length stands for max_new_tokens."""
    if generation.get("generation_config") is not None:
        return dict(generation)
    left_open = {k: v for k, v in defaults.items() if not (k == "max_new_tokens" and "max_length" in generation)}
    return {**left_open, **generation}


def setting(generation: Mapping[str, Any], name: str, default: Any) -> Any:
    """As `generate` takes it: a keyword holds before generation_config, and that before the model's own."""
    if name in generation:
        return generation[name]
    value = getattr(generation.get("generation_config"), name, None)
    return default if value is None else value


def end_tokens(model: Any, generation: Mapping[str, Any]) -> dict[str, Any]:
    """The eos_token_id and pad_token_id of `perplexity` with which this `generate` ends its rows."""
    of_model = model.language_model if model.config.model_type in _LANGUAGE_MODEL_GENERATES else model
    eos, pad = (
        setting(generation, name, getattr(of_model.generation_config, name, None))
        for name in ("eos_token_id", "pad_token_id")
    )
    if pad is None and eos is not None:  # so does generate
        pad = eos[0] if isinstance(eos, (list, tuple)) else int(eos)
    return {"eos_token_id": eos, "pad_token_id": pad}
