"""Benchmarks: `python -m pytest bench --benchmark-only`; their stored rows: `python -m bench.report`.

    --bench-set quick|full     quick: the most telling cases, for a GPU that is there for minutes
    --bench-budget SECONDS     start no case after that; what was measured is kept
    --save-results             append each case's rows to bench/results/ as soon as it is measured
    -k "backward and d128"     cases by operation (forward, backward, decode, packed, read-out), size, dtype

operations.py (what is measured, FLOPs, bytes) and cases.py (of which sizes) -> inputs.py (tensors) -> peers/ (who can
compute them) -> agreement.py (is it right) -> sampling.py (times in turns) -> results.py (rows) -> tables.py,
markdown.py, plots.py.

aot.py with aot_*.py and machine_code.py compile the kernels for GPUs that are not here (`make aot`); gpu.py runs tests
and benchmarks on one that is (`make gpu`).
"""
