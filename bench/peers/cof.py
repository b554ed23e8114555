"""CoF (arXiv 2412.16869) as the package has it, its two passes made apart from each other as the authors' code makes
them, and one plain answer, all from images and questions to text.

What the model writes has no box in it, as its weights are random: every peer then raises all image tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import finegrain_ops

from ..generate_inputs import CoFInputs
from .interface import Call, Peer

SHARED_PREFIX = 'finegrain_ops CoF, rows="after_image"'
SHARED_VISION = "finegrain_ops CoF"
NOTHING_SHARED = "two passes with nothing shared"
ONE_ANSWER = "one plain answer"


def cof_peers() -> list[Peer]:
    return [
        Peer(SHARED_VISION, _cof("all"), is_ours=True),
        Peer(SHARED_PREFIX, _cof("after_image"), is_ours=True),
        Peer(NOTHING_SHARED, _two_passes),
        Peer(ONE_ANSWER, _one_answer, is_biased=False),
    ]


def _cof(rows: str) -> Callable[[CoFInputs], Call]:
    def prepare(inputs: CoFInputs) -> Call:
        case = inputs.case
        cof = finegrain_ops.CoF(
            inputs.model,
            inputs.processor,
            weight=case.weight,
            rows=rows,
            grounding_tokens=case.grounding_tokens,
            grounding_generation=inputs.ends_at(case.grounding_tokens),
        )
        settings = {"max_new_tokens": case.new_tokens, **inputs.ends_at(case.new_tokens)}
        return lambda: [result.text for result in cof.answer_batch(inputs.images, inputs.questions, **settings)]

    return prepare


def _two_passes(inputs: CoFInputs) -> Call:
    from finegrain_ops.methods.grounding import GROUNDING_PROMPT

    case, sizes = inputs.case, [image.size[::-1] for image in inputs.images]
    grounding = [GROUNDING_PROMPT.replace("{question}", question) for question in inputs.questions]

    def call() -> list[str]:
        with finegrain_ops.patch(inputs.model, inputs.processor) as handle:
            inputs.generate(inputs.encode(grounding), case.grounding_tokens)
            encoded = inputs.encode(inputs.questions)
            none = [[] for _ in sizes]
            bias = handle.key_bias(encoded, none, sizes, weight=case.weight, complement="image")
            return inputs.generate(encoded, case.new_tokens, key_bias=bias)

    return call


def _one_answer(inputs: CoFInputs) -> Call:
    def call() -> Any:
        return inputs.generate(inputs.encode(inputs.questions), inputs.case.new_tokens)

    return call
