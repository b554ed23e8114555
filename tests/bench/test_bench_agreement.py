"""Before anyone's time is taken, results are compared; here with peers that are right, wrong and missing."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import agreement
from bench.agreement import errors, keep_correct, reference, tolerance
from bench.cases import AttentionCase, cache, causal, packed
from bench.inputs import make_inputs
from bench.operations import BACKWARD, FORWARD, READ_OUT
from bench.peers import EAGER, SDPA_UNBIASED, Gradients, Peer, PeerUnavailable, peers_for, start_all

CPU = torch.device("cpu")
CASES = [
    causal(256, 64, torch.float32),
    causal(256, 64, torch.float32, BACKWARD),
    causal(256, 80, torch.bfloat16, BACKWARD, kv_heads=4),
    cache(256, 64, torch.float32, kv_heads=4, batch=2),
    packed(256, 64, torch.float32, kv_heads=4),
    causal(256, 64, torch.float32, READ_OUT, kv_heads=4),
    dataclasses.replace(causal(256, 64, torch.float32, READ_OUT), name="last-rows", read_rows=24),
]


def peers_without_compiler(case: AttentionCase) -> list[Peer]:
    return [peer for peer in peers_for(case.operation, "cpu") if peer.name != "FlexAttention"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_all_peers_agree_and_those_for_cuda_say_so(case: AttentionCase) -> None:
    peers = peers_without_compiler(case)
    with torch.set_grad_enabled(case.operation == BACKWARD):
        inputs = make_inputs(case, CPU)
        calls, reasons = start_all(peers, inputs)
        calls, found = keep_correct(calls, peers, inputs, reasons)
    assert next(iter(calls)) == peers[0].name
    assert calls.keys() | reasons.keys() == {peer.name for peer in peers}
    assert set(reasons.values()) <= {"it runs on CUDA devices only"}
    assert max(found.values()) <= tolerance(case)


def wrong(peer: Peer, factor: float) -> Peer:
    """One whose result is off by a factor in a single row: of the output, or of the last gradient that it gives."""

    def prepare(inputs):
        call = peer.prepare(inputs)

        def wrong_call():
            result = call().clone()
            result[..., -1, :] *= factor
            return result

        return wrong_call

    return dataclasses.replace(peer, prepare=prepare)


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3], CASES[4]], ids=lambda case: case.id)
def test_a_wrong_peer_is_not_timed_and_the_reason_is_kept(case: AttentionCase) -> None:
    ours, *others = peers_without_compiler(case)
    peer = wrong(next(peer for peer in others if peer.name.startswith(EAGER)), 3.0)
    with torch.set_grad_enabled(case.operation == BACKWARD):
        inputs = make_inputs(case, CPU)
        calls, reasons = start_all([ours, peer], inputs)
        calls, _ = keep_correct(calls, [ours, peer], inputs, reasons)
    assert list(calls) == [ours.name]
    assert "its result is wrong" in reasons[peer.name]


def test_ours_being_wrong_fails() -> None:
    case = CASES[0]
    peers = [wrong(peers_for(FORWARD, "cpu")[0], 1.5)]
    inputs = make_inputs(case, CPU)
    calls, reasons = start_all(peers, inputs)
    with pytest.raises(AssertionError, match="nothing is timed"):
        keep_correct(calls, peers, inputs, reasons)


def test_a_forgotten_bias_is_seen() -> None:
    for case in (CASES[0], CASES[1]):
        unbiased = next(peer for peer in peers_for(FORWARD, "cpu") if peer.name == SDPA_UNBIASED)
        pretender = dataclasses.replace(unbiased, is_biased=True)
        with torch.set_grad_enabled(case.operation == BACKWARD):
            inputs = make_inputs(case, CPU)
            found = errors({pretender.name: pretender.start(inputs)}, [pretender], inputs)
        assert found[pretender.name] > 0.1


def test_the_reference_is_that_of_autograd() -> None:
    case = causal(256, 64, torch.float32, BACKWARD, kv_heads=4)
    inputs = make_inputs(case, CPU)
    expected = reference(inputs)
    query, key, value, bias = (
        t.detach().double().requires_grad_() for t in (inputs.query, inputs.key, inputs.value, inputs.key_bias)
    )
    keys, values = (t.repeat_interleave(4, dim=1) for t in (key, value))
    scores = query @ keys.mT / 8 + bias
    scores = scores.masked_fill(torch.ones(256, 256, dtype=torch.bool).triu(1), float("-inf"))
    output = scores.softmax(-1) @ values
    gradients = torch.autograd.grad(output, (query, key, value, bias), inputs.grad_output.double())
    torch.testing.assert_close(expected.output, output)
    torch.testing.assert_close(expected.key_sums, scores.softmax(-1).sum(dim=(1, 2)))
    for actual, gradient in zip(expected.gradients, gradients):
        torch.testing.assert_close(actual, gradient)


def test_of_many_rows_some_are_checked_and_the_gradient_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "MOST_ROWS", 32)
    monkeypatch.setattr(agreement, "_LARGEST_CHUNK", 16 * 256 * 7)  # seven rows at a time
    inputs = make_inputs(CASES[1], CPU)
    before = inputs.grad_output.clone()
    rows = agreement.checked_rows(inputs)
    assert len(rows) == 32
    assert (rows[0], rows[-1]) == (0, 255)
    peers = peers_without_compiler(CASES[1])
    calls, _ = start_all(peers, inputs)
    found = errors(calls, peers, inputs)
    assert max(found.values()) <= tolerance(CASES[1])
    assert torch.equal(inputs.grad_output, before)


def test_an_error_of_anothers_code_is_a_reason_and_one_of_ours_is_not() -> None:
    def prepare(inputs):
        raise KeyError("broken")

    inputs = make_inputs(CASES[0], CPU)
    with pytest.raises(PeerUnavailable, match="KeyError: 'broken'"):
        Peer("theirs", prepare).start(inputs)
    with pytest.raises(KeyError):
        Peer("ours", prepare, is_ours=True).start(inputs)


def test_gradients_of_the_bias_may_be_missing_but_not_nan() -> None:
    case = CASES[1]
    inputs = make_inputs(case, CPU)
    expected, peer = reference(inputs), peers_for(BACKWARD, "cpu")[0]
    right = peer.start(inputs)()
    assert agreement.error_of(right._replace(key_bias=None), expected, peer) <= tolerance(case)
    nan = Gradients(*(torch.full_like(t, float("nan")) for t in right))
    assert agreement.error_of(nan, expected, peer) == float("inf")
