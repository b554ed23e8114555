"""Benchmarks: `python -m pytest bench --benchmark-only`; their stored rows: `python -m bench.report`.

    --bench-set quick|full     quick: the most telling cases, for a GPU that is there for minutes
    --bench-budget SECONDS     start no case after that; what was measured is kept
    --save-results             append each case's rows to bench/results/ as soon as it is measured
    -k "backward and d128"     cases by operation (forward, backward, decode, packed, read-out, crop_resize), size...

operations.py (what is measured, FLOPs, bytes) and cases.py (of which sizes) -> inputs.py (tensors) -> peers/ (who can
compute them) -> agreement.py (is it right) -> sampling.py (times in turns) -> results.py (rows) -> tables.py,
markdown.py, plots.py. For crop_resize the middle of it is crop_cases.py -> crop_inputs.py -> peers/crop_*.py ->
crop_agreement.py.

aot.py with aot_*.py and machine_code.py compile the kernels for GPUs that are not here (`make aot`); gpu.py runs tests
and benchmarks on one that is (`make gpu`).
"""
