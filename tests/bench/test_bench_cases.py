"""Which cases are measured, and what is counted of them."""

from __future__ import annotations

import pytest
import torch

from bench.cases import HEAD_DIMS, SIZES, AttentionCase, cache, cases_for, causal, llava_read_out, masked, packed
from bench.ceilings import Ceilings, MeasuredCeilings, copy_gb_per_s, matmul_tflops
from bench.inputs import PackedInputs, make_inputs, packed_region_mask, region_mask
from bench.operations import (
    ATTENTION_OPERATIONS,
    BACKWARD,
    DECODE,
    FORWARD,
    MASKED,
    OPERATIONS,
    PACKED,
    READ_OUT,
    WHOLE_ANSWERS,
    decode_bytes,
    flops,
    score_count,
    speed,
)
from bench.peers import NEEDS_CUDA, SDPA_EFFICIENT_MASK, SDPA_UNBIASED, ours, ours_unbiased, peers_for, start_all

CPU = torch.device("cpu")


SWEPT = [operation for operation in ATTENTION_OPERATIONS if operation != MASKED]  # the sweep of FORWARD has its peers


@pytest.mark.parametrize("operation", SWEPT)
def test_cuda_covers_every_promised_size_head_dimension_dtype_and_kind_of_heads(operation: str) -> None:
    cases = [case for case in cases_for("cuda") if case.operation == operation]
    assert {(case.num_keys, case.head_dim) for case in cases} >= {(n, d) for n in SIZES for d in HEAD_DIMS}
    for dtype in (torch.float16, torch.bfloat16):
        assert {case.head_dim for case in cases if case.dtype == dtype} >= set(HEAD_DIMS)
        assert {case.num_keys for case in cases if case.dtype == dtype} >= {SIZES[0], SIZES[-1]}
    assert {case.head_dim for case in cases if case.has_groups} >= set(HEAD_DIMS)
    assert {case.num_keys for case in cases if case.has_groups} >= {SIZES[0], SIZES[-1]}


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_quick_set_has_every_operation_and_comes_first_in_the_full_one(device_type: str) -> None:
    quick, full = cases_for(device_type, "quick"), cases_for(device_type, "full")
    operations = ATTENTION_OPERATIONS if device_type == "cuda" else tuple(SWEPT)
    assert {case.operation for case in quick} == set(operations)
    assert [case.id for case in full[: len(quick)]] == [case.id for case in quick]
    assert len({case.id for case in full}) == len(full)
    assert [case.operation for case in quick[: len(operations)]] == list(operations)


def test_the_cuda_kernels_are_compared_with_a_mask_at_the_promised_sizes() -> None:
    cases = [case for case in cases_for("cuda", "quick") if case.operation == MASKED]
    assert {(case.num_keys, case.head_dim, case.is_causal) for case in cases} == {
        (num_keys, head_dim, is_causal)
        for num_keys in (512, 1024, 2048, 4096)
        for head_dim in (64, 128)
        for is_causal in (True, False)
    }
    assert {case.dtype for case in cases} == {torch.float16}
    names = {peer.name for peer in peers_for(MASKED, "cuda")}
    assert names == {ours("cuda"), ours_unbiased("cuda"), SDPA_EFFICIENT_MASK, SDPA_UNBIASED}


@pytest.mark.parametrize("is_causal", [True, False])
def test_masked_is_a_forward_pass(is_causal: bool) -> None:
    case = masked(512, 64, is_causal)
    forward = causal(512, 64, torch.float16, FORWARD)
    assert flops(case) == flops(forward) * (1 if is_causal else 2)
    inputs = make_inputs(case, CPU)
    assert inputs.query.shape == inputs.key.shape == (1, 16, 512, 64)
    assert not inputs.query.requires_grad


@pytest.mark.parametrize("operation", [operation for operation in ATTENTION_OPERATIONS if operation != READ_OUT])
def test_on_a_cpu_the_cuda_kernels_and_their_rival_say_why_they_are_absent(operation: str) -> None:
    wanted = [ours("cuda"), ours_unbiased("cuda"), *([SDPA_EFFICIENT_MASK] if operation != PACKED else [])]
    peers = [peer for peer in peers_for(operation, "cpu") if peer.name in wanted]
    case = packed(256, 64, torch.float32) if operation == PACKED else causal(256, 64, torch.float32, operation)
    _, reasons = start_all(peers, make_inputs(case, CPU))
    assert reasons == dict.fromkeys(wanted, NEEDS_CUDA)


@pytest.mark.parametrize("operation", [operation for operation in OPERATIONS if operation not in WHOLE_ANSWERS])
def test_on_a_gpu_the_cuda_kernels_join_every_operation(operation: str) -> None:
    names = [peer.name for peer in peers_for(operation, "cuda")]
    assert ours("cuda") in names
    if operation in (FORWARD, BACKWARD, DECODE, MASKED):
        assert {SDPA_EFFICIENT_MASK, SDPA_UNBIASED, ours_unbiased("cuda")} <= set(names)


def test_flops_are_counted_as_stated() -> None:
    case = causal(1024, 128, torch.float16)
    assert flops(case) == 4 * 16 * 1024 * 1024 * 128 / 2
    assert flops(causal(1024, 128, torch.float16, BACKWARD)) == 3.5 * flops(case)
    assert flops(cache(1024, 64, torch.float16, batch=3)) == 3 * 4 * 16 * 1 * 1024 * 64
    sequences = packed(1024, 64, torch.float16)
    assert flops(sequences) == 4 * 16 * 64 * sum(length**2 for length in sequences.lengths) / 2


def test_a_read_out_of_some_rows_counts_the_scores_that_they_see() -> None:
    case = llava_read_out(640, torch.float16)
    exactly = sum(row + 1 for row in range(640 - 24, 640)) * 32
    assert score_count(case) == pytest.approx(exactly, rel=1e-3)
    assert score_count(causal(640, 64, torch.float16, READ_OUT)) == 16 * 640 * 640 / 2


def test_decode_counts_its_bytes_once() -> None:
    case = cache(1024, 64, torch.float16, kv_heads=4, batch=2)
    tensors = make_inputs(case, CPU)
    assert decode_bytes(case) == sum(t.nbytes for t in (tensors.query, tensors.key, tensors.value, tensors.query))


def test_speed_relates_decode_to_the_copy_and_the_rest_to_the_matrix_product() -> None:
    ceilings = Ceilings(matmul_tflops=500.0, copy_gb_per_s=4000.0)
    decode = cache(16384, 128, torch.float16)
    fields = speed(decode, decode_bytes(decode) / 2e9, ceilings)  # at 2 TB/s
    assert fields["gb_per_s"] == pytest.approx(2000.0)
    assert fields["share_of_ceiling"] == pytest.approx(0.5)
    forward = causal(4096, 128, torch.float16)
    fields = speed(forward, flops(forward) / 250e9, ceilings)  # at 250 TFLOP/s
    assert fields["tflops"] == pytest.approx(250.0)
    assert fields["share_of_ceiling"] == pytest.approx(0.5)
    assert "bytes" not in fields


def test_ceilings_are_measured_once_and_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    assert matmul_tflops(CPU, torch.float32, 64) > 0
    assert copy_gb_per_s(CPU, 1 << 16) > 0
    calls = []
    monkeypatch.setattr("bench.ceilings.matmul_tflops", lambda *arguments: calls.append(arguments) or 1.0)
    monkeypatch.setattr("bench.ceilings.copy_gb_per_s", lambda *arguments: calls.append(arguments) or 2.0)
    ceilings = MeasuredCeilings(CPU)
    assert ceilings.of(torch.float32) == ceilings.of(torch.float32) == (1.0, 2.0)
    assert len(calls) == 2


def test_packed_lengths_add_up_and_regions_lie_inside_sequences() -> None:
    inputs = make_inputs(packed(256, 64, torch.float32), CPU)
    assert isinstance(inputs, PackedInputs)
    sequences = inputs.sequences()
    assert [sequence.case.num_keys for sequence in sequences] == list(inputs.case.lengths)
    assert torch.equal(torch.cat([s.query[0].transpose(0, 1) for s in sequences]), inputs.query)
    assert 0.1 < inputs.region_mask.float().mean() < 0.2


def test_every_region_is_about_its_share_of_the_keys() -> None:
    for case in [*cases_for("cuda"), *cases_for("cpu")]:
        region = packed_region_mask(case.lengths) if case.operation == PACKED else region_mask(case)
        assert 0.11 < region.float().mean() < 0.19, case.id


def test_a_case_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="have lengths"):
        AttentionCase("x", 1, 640, 640, 64, torch.float32, operation=PACKED)
    with pytest.raises(ValueError, match="add up to 3"):
        AttentionCase("x", 1, 640, 640, 64, torch.float32, operation=PACKED, lengths=(1, 2))
    with pytest.raises(ValueError, match="square"):
        AttentionCase("x", 1, 1, 640, 64, torch.float32, operation=DECODE)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_peers_have_names_of_their_own_and_ours_come_first(operation: str, device_type: str) -> None:
    peers = peers_for(operation, device_type)
    assert len({peer.name for peer in peers}) == len(peers)
    assert peers[0].is_ours
    assert peers[0].is_biased
    assert [peer.is_ours for peer in peers] == sorted((peer.is_ours for peer in peers), reverse=True)
