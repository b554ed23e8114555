"""How sure a model was of its answer: perplexity from the logits that `generate` computed anyway.

DualFocus (arXiv 2402.14767), Eq. 7: exp(-1/N sum_i log p(w_i | w_<i)) over the N tokens of the answer.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from ..validation import describe

_LARGEST_EXPONENT = math.log(sys.float_info.max)


def new_tokens(sequences: Tensor, num_steps: int, beam_indices: Tensor | None = None) -> Tensor:
    """(R, N): what was generated, of the sequences (R, prompt + N) or (R, N) that `generate` returns: some models put
    the prompt before it, others do not.

    num_steps is len(output.logits). With beams the longest hypothesis may be shorter than the search was; the width of
    output.beam_indices tells.
    """
    width = num_steps if beam_indices is None else beam_indices.shape[1]
    return sequences[:, sequences.shape[1] - width :]


def answer_mask(tokens: Tensor, eos_token_id: int | Sequence[int] | None, pad_token_id: int | None) -> Tensor:
    """(R, N) bool: which generated tokens are the answer: up to its end-of-sequence token, that included, since the
    model chose it too. Where there is none, all but the padding at the end.
    """
    eos = torch.as_tensor([] if eos_token_id is None else eos_token_id, dtype=tokens.dtype, device=tokens.device)
    is_eos = torch.isin(tokens, eos)
    after_end = is_eos.cumsum(1) - is_eos.long() > 0
    if pad_token_id is not None:
        after_end |= (tokens == pad_token_id) & ~is_eos
    return after_end.long().flip(1).cumprod(1).flip(1) == 0  # only what goes on to the end of the row


def token_log_probabilities(tokens: Tensor, logits: Sequence[Tensor], beam_indices: Tensor | None = None) -> Tensor:
    """log p(w_i | w_<i) of every generated token: (R, N) float32.

    Args:
        tokens: (R, N), see `new_tokens`.
        logits: per step (rows of the search, vocabulary), output.logits of generate(..., output_logits=True): the
            model's own, before temperature and other processing.
        beam_indices: (R, N) int64: in which row of a step's logits each token was chosen, -1 after the end;
            output.beam_indices. None: rows are sequences.

    Raises:
        ValueError: tokens are more than there are steps, or rows of tokens and logits differ without beam_indices.
    """
    if tokens.dim() != 2 or len(logits) < tokens.shape[1]:
        raise ValueError(
            f"tokens: expected (R, N) generated tokens with N at most the {len(logits)} steps of logits, got "
            f"{describe(tokens)}; cut the prompt off, as new_tokens does"
        )
    if beam_indices is None and any(len(step) != len(tokens) for step in logits):
        raise ValueError(
            f"logits: expected one row for each of the {len(tokens)} sequences, got {len(logits[0])}; pass beam_indices"
        )
    columns = []
    for i, step in enumerate(logits[: tokens.shape[1]]):  # one at a time: all of them in float32 would be large
        rows = step if beam_indices is None else step[beam_indices[:, i].clamp(min=0)]
        rows = rows.to(device=tokens.device, dtype=torch.float32)
        columns.append(rows.gather(1, tokens[:, i : i + 1])[:, 0] - rows.logsumexp(1))
    return torch.stack(columns, 1) if columns else torch.zeros(tokens.shape, device=tokens.device)


def perplexity(
    tokens: Tensor,
    logits: Sequence[Tensor],
    *,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    beam_indices: Tensor | None = None,
) -> Tensor:
    """exp(-1/N sum log p) over the N tokens of each answer (see `answer_mask`): (R,) float32, at least 1.

    NaN where there is no token at all. An answer without words still has its end-of-sequence token, and the perplexity
    of that.

    Args, Raises: see `token_log_probabilities`.
    """
    mask = answer_mask(tokens, eos_token_id, pad_token_id)
    log_probabilities = token_log_probabilities(tokens, logits, beam_indices).masked_fill(~mask, 0.0)
    return torch.exp(-log_probabilities.sum(1) / mask.sum(1))


def perplexity_of(log_probabilities: Sequence[float]) -> float:
    """exp(-1/N sum log p) (DualFocus, arXiv 2402.14767, Eq. 7); NaN of nothing, infinity beyond a float."""
    if not log_probabilities:
        return math.nan
    mean = -math.fsum(log_probabilities) / len(log_probabilities)
    return math.inf if mean > _LARGEST_EXPONENT else math.exp(mean)
