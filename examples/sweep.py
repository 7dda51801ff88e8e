"""Many edits from one probe, evaluated together and compared as statistics demand."""

# %% The grid
# A list stands for each of its items, several lists for all their combinations; here two modes, and one factor.
from pathlib import Path

from spectral_fast import embedded
from spectral_fast.evaluation import EngineOptions
from spectral_fast.sweep import Settings, load_configs, run_sweep

Path("grid.yaml").write_text(
    f"""\
base_model: {embedded.base_model_dir()}
lora_local_path: {embedded.adapter_dir()}
calib_data: {embedded.calibration_file()}
calib_samples: 16
edit_mode: [abs_select, smooth_abs]
amp_factor: [1.5]
eval_data: {embedded.heldout_file()}
eval_fewshot: 0
eval_max_samples: 8
eval_max_tokens: 110
""",
    encoding="utf-8",
)
configs = load_configs("grid.yaml")
print(f"{len(configs)} configurations: " + ", ".join(f"{config.mode}" for config in configs))

# %% Run it
# The original and random edits of the same counts and factors are added, by default five; one here, and 8 problems, to
# take seconds: nothing can be significant. The folder's ledger says what is done: started again, a sweep goes on where
# it was stopped.
settings = Settings("sweep", engine=EngineOptions(engine="transformers", batch_size=64))
result = run_sweep(configs, settings, controls=1, note=print)

# %% What came out
# p-values are McNemar's, corrected by Holm for all variants.
for run in result["runs"]:
    difference = "" if run["comparison"] is None else f"{run['comparison']['difference']:+.1%}"
    print(f"{run['label']:<32}{run['score']:>7.1%}  {difference:>7}  {run['verdict'] or ''}")
print(result["report"])
assert run_sweep(configs, settings, controls=1, note=print)["lines"] == result["lines"]  # nothing was left to do
