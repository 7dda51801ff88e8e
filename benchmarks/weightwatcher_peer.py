"""WeightWatcher on matrices in a file, by an interpreter that has it: ``python -I weightwatcher_peer.py FILE ROUNDS``.

FILE is torch.save's {group: {name: matrix}}. Prints the version, seconds per group and round, and exponents. Its own
settings: a power law by its own search of xmin (its default), nothing plotted. Needs torch and weightwatcher alone.
"""

import contextlib
import io
import json
import logging
import sys
import time

import torch

with contextlib.redirect_stdout(io.StringIO()):
    import weightwatcher

SIDE = 50_000  # its limit on the longer side (max_N) otherwise skips the head of a large vocabulary


def model_of(group):
    """Linear layers with these weights, in their order."""
    layers = torch.nn.ModuleList()
    for matrix in group.values():
        layer = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
        layer.weight = torch.nn.Parameter(matrix, requires_grad=False)
        layers.append(layer)
    return layers


def main():
    """Analyse every group as a model of its own."""
    logging.disable(logging.WARNING)
    groups, rounds = torch.load(sys.argv[1]), int(sys.argv[2])
    seconds, alphas = {name: [] for name in groups}, {}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        weightwatcher.WeightWatcher(model=model_of({"warm": torch.randn(64, 64)})).analyze()
        for _ in range(rounds):
            for name, group in groups.items():
                watcher = weightwatcher.WeightWatcher(model=model_of(group))
                start = time.perf_counter()
                details = watcher.analyze(max_N=SIDE)
                seconds[name].append(time.perf_counter() - start)
                alphas.update(zip(group, map(float, details.alpha), strict=True))
    print(json.dumps({"version": weightwatcher.__version__, "seconds": seconds, "alphas": alphas}))


main()
