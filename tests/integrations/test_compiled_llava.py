"""A left-padded batch through a patched LLaVA, its attention by the compiled Triton kernels, executed as PTX."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton exists for Linux only")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter's process compiles nothing", allow_module_level=True)

import finegrain_ops
import tiny_llava
from finegrain_ops import ops
from ptx.project import on_ptx
from ptx.triton_kernels import NOT_OURS
from tolerances import assert_close


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("head_dim", "heads"), [(16, 4), (64, 2), (128, 1)])
def test_two_layers_equal_eager_attention(head_dim: int, heads: int, capability: int) -> None:
    """The rows of the padding see no key at all, and the second layer reads what the first gives there."""
    shape = {"hidden_size": head_dim * heads, "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 2)}
    model = tiny_llava.make_model(num_hidden_layers=2, **shape).bfloat16()  # its weights are these in every precision
    inputs = tiny_llava.make_inputs((6, 60))
    bias, real = tiny_llava.make_bias(inputs["input_ids"]), inputs["attention_mask"].bool()
    assert real.sum(1).tolist() == [23, 77]

    def logits(**options) -> torch.Tensor:
        with torch.no_grad():
            return model(**{**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}, **options).logits[real]

    with tiny_llava.EagerOracle(model.float(), bias):
        expected = logits()
    with tiny_llava.EagerOracle(model.bfloat16(), bias):
        eager = logits()
    attention = ops.reweighted_attention
    by_triton = mock.patch.object(ops, "reweighted_attention", lambda *args: attention(*args[:-1], "triton"))
    with finegrain_ops.patch(model), by_triton, on_ptx(capability) as runner:
        actual = logits(key_bias=bias)
    assert {run.kernel for run in runner.runs} == {"prepare_key_bias_kernel", "attention_forward_kernel"}
    assert set(runner.report.kinds()) <= NOT_OURS, str(runner.report)
    assert_close(actual, expected, torch.bfloat16, "logits", eager)
