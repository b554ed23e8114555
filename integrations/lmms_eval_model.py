"""The class that lmms-eval loads for `--model finegrain_cof`. It needs lmms-eval; lmms_eval.py does the work."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger

from ..methods.cof import CoF
from .lmms_eval import MODEL_NAME, Arguments, CoFEvaluation, PlainAnswers, load


class FinegrainCoF(lmms):  # type: ignore[misc]
    """A checkpoint that answers by CoF (arXiv 2412.16869). Takes the arguments of `Arguments` and of `CoF`.

    How many answers had a box, and how many were given without CoF, is in "throughput" of the results; box and
    grounding text of every answer are logged at level DEBUG.
    """

    is_simple = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        given = Arguments.parse(arguments, CoF)
        model, processor = load(given)
        if given.preset is None:
            cof = CoF(model, processor, **given.cof)
        else:
            cof = CoF.from_preset(given.preset, model, processor, **given.cof)
        # What lmms-eval reads where several processes share the work (accelerate launch, torchrun):
        self._rank, self._world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.device: torch.device = model.device
        self.batch_size = given.batch_size
        self._tokenizer = processor.tokenizer
        self._evaluation: CoFEvaluation | None = CoFEvaluation(
            cof,
            PlainAnswers(model, processor, given.cof.get("template")),
            batch_size=given.batch_size,
            max_new_tokens=given.max_new_tokens,
            debug=logger.debug,
            warn=logger.warning,
        )

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        if self._evaluation is None:
            raise RuntimeError(f"{MODEL_NAME}: lmms-eval has released this model (clean); make another one")
        start = time.perf_counter()
        answers = self._evaluation.answer(requests, self.task_dict, show_progress=self.rank == 0)
        seconds = time.perf_counter() - start
        num_tokens = sum(len(ids) for ids in self._tokenizer(answers, add_special_tokens=False)["input_ids"])
        counts = {f"answers_{kind}": count for kind, count in self._evaluation.counts.items()}
        log_metrics(seconds, num_tokens, num_tokens / seconds, counts)
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError(
            f"{MODEL_NAME}: CoF answers one question about one image; tasks of several rounds are not supported"
        )

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            f"{MODEL_NAME}: tasks that compare log-likelihoods (output_type loglikelihood or "
            "multiple_choice) are not supported; take those of output_type generate_until"
        )

    def clean(self) -> None:
        """After the last answer: frees the model's memory."""
        self._evaluation = None
        super().clean()
