"""What spectral_fast costs, beside what people run today and what the machine allows.

``python -m benchmarks`` (``make bench``) prints the tables and writes ``results/<machine>.csv``;
``pytest benchmarks --benchmark-only`` times single kernels.

    cases.py      workloads, as data             factors.py  their tensors
    peers.py      implementations compared       codegen.py  every GPU kernel, compiled
    workloads.py  both together, and floors      timing.py   interleaved repeats, pinning
    worker.py     one workload in one process    floors.py   measured bandwidth and peak
    files.py      commands, timed from outside   machine.py  where it ran
    records.py    rows of the CSV                figures.py  the figures to reach
    run.py        all of it, in order
"""
