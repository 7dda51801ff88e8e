"""What spectral_fast costs, beside what people run today and what the machine allows.

``python -m benchmarks`` (``make bench``) prints the tables and writes ``results/<machine>.csv``;
``pytest benchmarks --benchmark-only`` times single kernels.

    cases.py      workloads, as data             tasks.py    which of them are run
    factors.py    their tensors                  peers.py    implementations compared
    workloads.py  both together, and floors      timing.py   interleaved repeats, pinning
    worker.py     one workload in one process    floors.py   measured bandwidth and peak
    files.py      commands, timed from outside   machine.py  where it ran
    records.py    rows of the CSV                run.py      all of it, in order
    figures.py    the figures to reach

    toolbox.py    resize and inspect, file to file
    head.py       the subspace gate's look       stream.py   the directions that it keeps

Experiments on the embedded model, commands of their own:

    experiment.py what they share                adaptive.py adaptive ranks beside one rank
    spline.py     LS-LoRA beside LoRA            gate.py     gated training beside random skipping
    novelty.py    a gate, watched

Of calibration:

    models.py     random Llamas, also on disk    samples.py  GSM8K, and a tokenizer for it
    peers_calibration.py  hooks and plain PEFT   calibration.py  ours beside them, and what g costs
    streamed.py   streaming beside memory        commands.py probe --stream and torchrun, from outside
    ranks.py      one process of several         scaling.py  time and memory elsewhere, by counting

Without a GPU, of the kernels for GPUs:

    codegen.py    compiled for every architecture resources.py  what they use, from the machine code
    roofline.py   bytes beside the least possible traffic.py    bytes of each launch, by models of the kernels
"""
