"""What is run: tasks, and names of the implementations that they compare. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.cases import (
    ALL_LINEAR,
    LLAMA2_7B,
    LLAMA3_70B,
    SURGERY,
    TINY,
    TINY_LLAMA,
    Adapter,
    Calibration,
    Cores,
    Elements,
    Head,
    Model,
    Projections,
    Spectra,
    Stream,
    Task,
)

OURS = "spectral_fast"
PER_MODULE = ("reference", "torch QR + SVD")
LOW_RANK = (*PER_MODULE, "torch batched SVD", "SciPy QR + SVD")
DENSE = ("torch.svd_lowrank", "PEFT svd")
SEGMENTS = ("reference",)
CORES = ("torch batched SVD", "torch SVD one by one", "SciPy one by one")


def _rebuild(
    model: Model, targets: tuple[str, ...], rank: int, dtype: str, *peers: str, rounds: int = 3, budget: float = 3
) -> Task:
    return Task("rebuild", Adapter(model, targets, rank, dtype), peers, rounds, budget)


# The two adapters that the figures are about, with all that they are compared with.
SURGERY_70B = _rebuild(LLAMA3_70B, SURGERY, 64, "bfloat16", *LOW_RANK, DENSE[0], rounds=7, budget=8)
ALL_70B = _rebuild(LLAMA3_70B, ALL_LINEAR, 16, "bfloat16", *LOW_RANK, rounds=7, budget=8)
CORES_64 = Task("svd", Cores(560, 64), CORES, rounds=9, budget=5)
EDIT_70B = Task("edit", Adapter(LLAMA3_70B, ALL_LINEAR, 64, "bfloat16"), (), rounds=5)

BATCH_8, PADDED = f"{OURS}, nominal batch 8", f"{OURS}, padded"
HOOKS, PLAIN = ("hooks, batch 2", "hooks, batch 8"), ("PEFT, batch 2", "PEFT, batch 8")
ONE, TWO, STREAMED = "1 rank, 1 thread", "2 ranks, 1 thread each", "probe --stream"
SUMMED, WITHOUT, IN_MEMORY = "g summed over samples", "without g", "in memory"
SMALL_LLAMA = Calibration("8 layers of 1024", 8, 1024, 2816, 16, 32000, 32, 64, "bfloat16")
CALIBRATE = Task("calibrate", SMALL_LLAMA, (BATCH_8, PADDED, *HOOKS, *PLAIN), rounds=3, budget=30)
# One packed row, so that many pairs of passes are compared.
COST = Task("cost of g", replace(SMALL_LLAMA, samples=8), (SUMMED, WITHOUT), rounds=15)
STREAM = Task("stream", Calibration("Llama-2-7B", 32, 4096, 11008, 32, 32000, 8, 64, "bfloat16"), (), rounds=1)
STREAM_OR_MEMORY = Task("stream or memory", replace(SMALL_LLAMA, dtype="float32"), (IN_MEMORY,), rounds=3)
RANKS = Task("ranks", SMALL_LLAMA, (), rounds=3)
TORCH_SPLINE = "torch piecewise"
SPLINE = Task("spline", Elements(8192, 2048, 5, "bfloat16"), (TORCH_SPLINE,), rounds=9)
SVD_LOWRANK, DENSE_SVD = "torch.svd_lowrank", "torch.linalg.svd of the dense update"
QR_SVD, VALUES_ALONE = "torch QR + SVD", "torch QR without Q + svdvals"
RESIZE_7B = Task("resize", Adapter(LLAMA2_7B, ALL_LINEAR, 64, "bfloat16"), (SVD_LOWRANK, DENSE_SVD), rounds=5, budget=8)
# As many modules as the figure asks for: no Llama has 312.
LLAMA_312 = replace(LLAMA2_7B, name="Llama-2-7B widened to 78 layers", layers=78)
INSPECT_312 = Task(
    "inspect", Adapter(LLAMA_312, ALL_LINEAR[:4], 128, "bfloat16"), (QR_SVD, VALUES_ALONE), rounds=5, budget=8
)
PEFT = "PEFT"
WEIGHTED = Task(
    "weighted",
    Adapter(Model.llama("Llama, 4 layers of 2048", 4, 2048, 2048, 5632), ALL_LINEAR, 16, "float32"),
    (PEFT,),
    rounds=5,
    budget=8,
)
SVDVALS, SIDE_BY_SIDE = "torch svdvals", "torch svdvals, matrices side by side"
WEIGHTWATCHER = "WeightWatcher"
# The interpreter that has it: its dependencies are no business of ours.
WEIGHTWATCHER_PYTHON = "SPECTRAL_FAST_WEIGHTWATCHER_PYTHON"
LLAMA_2048 = Calibration("12 layers of 2048", 12, 2048, 5632, 16, 32000, 0, 8, "bfloat16")
MINILM = Task("spectra", Spectra("MiniLM-L6", "float32"), (SVDVALS, SIDE_BY_SIDE, WEIGHTWATCHER), rounds=5)
WIDE = Task(
    "spectra",
    Spectra("a Llama, 12 layers of 2048", "bfloat16", LLAMA_2048),
    (SVDVALS, SIDE_BY_SIDE, WEIGHTWATCHER),
    rounds=1,
)
ORIGINAL, WHOLE = "the original's in torch", "the same with a full logsumexp"
PASS = "forward pass"
LLAMA_16 = Calibration("16 layers of 2048", 16, 2048, 5632, 16, 32000, 0, 8, "bfloat16")
LOOK = Task("gate", Head(512, 2048, 32000, 512, 64, 64, "bfloat16", LLAMA_16), (ORIGINAL, WHOLE, PASS), 15, budget=20)
LOOK_32 = Task("gate", Head(512, 2048, 32000, 512, 64, 64, "float32"), (ORIGINAL, WHOLE), rounds=15, budget=20)
SVD_EACH, WITHOUT_WEIGHTS = "torch SVD per vector", f"{OURS}, without weights"
UPDATE = Task("update", Stream(64, 512, 400), (WITHOUT_WEIGHTS, SVD_EACH), rounds=9, budget=5)

FULL = (
    SURGERY_70B,
    ALL_70B,
    _rebuild(LLAMA2_7B, SURGERY, 16, "bfloat16", *LOW_RANK, *DENSE),
    _rebuild(LLAMA2_7B, SURGERY, 64, "bfloat16", *PER_MODULE),
    _rebuild(LLAMA2_7B, SURGERY, 64, "float32", *PER_MODULE),
    _rebuild(LLAMA2_7B, SURGERY, 128, "bfloat16", *PER_MODULE),
    _rebuild(LLAMA2_7B, ALL_LINEAR, 16, "float32", *PER_MODULE),
    _rebuild(LLAMA2_7B, ALL_LINEAR, 64, "bfloat16", *PER_MODULE),
    _rebuild(LLAMA3_70B, SURGERY, 16, "bfloat16", *PER_MODULE),
    _rebuild(LLAMA3_70B, SURGERY, 128, "bfloat16", *PER_MODULE),
    _rebuild(LLAMA3_70B, ALL_LINEAR, 64, "bfloat16", *PER_MODULE),
    CORES_64,
    Task("svd", Cores(560, 16), CORES, rounds=9, budget=2),
    Task("svd", Cores(160, 128), CORES, rounds=5, budget=4),
    Task("sensitivity", Projections(80, 32, 6400, 64, "bfloat16"), SEGMENTS, rounds=9, budget=3),
    Task("sensitivity", Projections(80, 32, 6400, 16, "float32"), SEGMENTS, rounds=9, budget=3),
    LOOK,
    LOOK_32,
    UPDATE,
    SPLINE,
    EDIT_70B,
    CALIBRATE,
    COST,
    STREAM_OR_MEMORY,
    RANKS,
    STREAM,
    MINILM,
    WIDE,
    RESIZE_7B,
    INSPECT_312,
    WEIGHTED,
)

# The same code on sizes that say nothing about speed.
QUICK = (
    _rebuild(TINY, SURGERY, 8, "bfloat16", *LOW_RANK, *DENSE, rounds=2, budget=1),
    _rebuild(TINY, ALL_LINEAR, 4, "float32", *PER_MODULE, rounds=2, budget=1),
    Task("svd", Cores(6, 16), CORES, rounds=2, budget=1),
    Task("sensitivity", Projections(3, 5, 200, 16, "bfloat16"), SEGMENTS, rounds=2, budget=1),
    replace(LOOK, case=Head(12, 128, 32000, 64, 8, 16, "bfloat16", TINY_LLAMA), rounds=2),
    replace(UPDATE, case=Stream(4, 24, 30), rounds=2),
    replace(SPLINE, case=Elements(70, 50, 5, "bfloat16"), rounds=2),
    Task("edit", Adapter(TINY, ALL_LINEAR, 8, "bfloat16"), (), rounds=1),
    replace(CALIBRATE, case=TINY_LLAMA, rounds=1),
    replace(COST, case=TINY_LLAMA, rounds=2),
    replace(STREAM_OR_MEMORY, case=replace(TINY_LLAMA, dtype="float32"), rounds=1),
    replace(RANKS, case=TINY_LLAMA, rounds=1),
    replace(STREAM, case=TINY_LLAMA, rounds=1),
    replace(RESIZE_7B, case=Adapter(TINY, ALL_LINEAR, 8, "bfloat16"), rounds=1),
    replace(INSPECT_312, case=Adapter(TINY, ALL_LINEAR, 8, "bfloat16"), rounds=1),
    replace(WEIGHTED, case=Adapter(TINY, ALL_LINEAR, 8, "float32"), rounds=1),
    replace(WIDE, case=Spectra("a tiny Llama", "bfloat16", replace(TINY_LLAMA, samples=0, vocabulary=300)), rounds=1),
)
