"""A LoRA rank for each layer: by the spectra of the base weights, or by what an adapter's directions were worth."""

# %% By the spectra
# Weights are read one matrix after the other. A small tail exponent and many spikes beyond the bulk of a random matrix
# are signs of a layer that has learnt much; the others get the larger ranks.
from pathlib import Path

from peft import get_peft_model
from transformers import AutoModelForCausalLM

from spectral_fast import Adapter, CalibrationOptions, embedded, get_adaptive_lora_config, probe
from spectral_fast.report.allocation import save_allocation_pictures

base = embedded.base_model_dir()
ranks = get_adaptive_lora_config(base, budget_uniform_rank=8, exclude_modules=["lm_head"])
chosen = ranks.table[ranks.table.rank_pattern > 0]
print(chosen[["layer_name", "alpha_hill", "num_spikes", "rank_pattern"]].round(2).to_string(index=False))

# %% As an adapter
# The budget was that of rank 8 on every layer there is to choose among, and is met to 1 %.
model = AutoModelForCausalLM.from_pretrained(base)
peft = get_peft_model(model, ranks.lora_config(task_type="CAUSAL_LM", use_rslora=True))
trainable = sum(p.numel() for p in peft.parameters() if p.requires_grad)
print(f"{trainable:,} parameters, ranks {min(ranks.rank_pattern.values())} to {ranks.r}")
assert trainable == ranks.parameters

# %% By sensitivities
# Σ_k |s_k g_k| says how much the loss depends on a module's directions: more where it is larger. 16 samples are few.
adapter = Adapter.open(embedded.adapter_dir())
data = CalibrationOptions(calib_data=str(embedded.calibration_file()), calib_samples=16)
sensitivity = probe(adapter, adapter.select("all-linear"), base, data)
measured = get_adaptive_lora_config(base, 1.0, minimum_rank=2, budget_uniform_rank=8, sensitivity=sensitivity)
for name, r in sorted(measured.rank_pattern.items(), key=lambda item: -item[1])[:4]:
    print(f"{name}: rank {r}")

# %% Pictures
# Exponents, spikes and ranks by depth, and every spectrum with its bulk and power law.
print([file.name for file in save_allocation_pictures(Path("pictures"), ranks)])
