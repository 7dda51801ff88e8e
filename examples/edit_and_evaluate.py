"""Edit an adapter by what its singular values are worth, and ask whether that did anything.

The adapter inside the package makes a Llama of 3 million parameters solve two-step problems. Nothing is downloaded.
Numbers of samples and problems are small, so that this takes seconds; they are far too small to tell methods apart.
"""

# %% Open the adapter
# An adapter is a folder as PEFT writes it. Its weights are read when they are asked for.
from spectral_fast import Adapter, CalibrationOptions, edit_adapter, embedded, evaluate_adapters, probe
from spectral_fast.evaluation import EngineOptions, EvaluationOptions, compare, read_correct
from spectral_fast.policies import AbsSelect, matched_control
from spectral_fast.report import write_report

adapter = Adapter.open(embedded.adapter_dir())
modules = adapter.select(("down_proj", "o_proj"))  # the method's choice, and the default
print(f"{len(modules)} of {len(adapter.modules)} modules, rank {modules[0].r}")

# %% Measure
# g_k = ∂L/∂σ_k of every singular value, summed over 32 samples of the training data.
base = embedded.base_model_dir()
data = CalibrationOptions(calib_data=str(embedded.calibration_file()), calib_samples=32)
sensitivity = probe(adapter, modules, base, data)
sensitivity.save("probed")  # for `spectral-fast edit --sensitivity probed`, any number of times
first = sensitivity.modules[modules[0].name]
print(f"{modules[0].name}: the largest |g| is {first.g.abs().max():.3f}, of direction {int(first.g.abs().argmax())}")

# %% Edit
# abs_select amplifies the fifth of the directions with the largest |g|, and suppresses the fifth with the smallest. A
# control has the same counts and factors at random directions: what it reaches, an edit reaches without knowing g.
policy = AbsSelect()
edited = edit_adapter(adapter, policy, "edited", sensitivity=sensitivity)
edit_adapter(adapter, matched_control(policy, seed=1), "control", modules=modules)
for name, module in edited.items():
    print(f"{name}: {module.edit.stats['k_core']} directions amplified, {module.edit.stats['k_noise']} suppressed")

# %% Evaluate
# All three in one engine, greedily, on the same 16 held-out problems; every text is in results/.
results = evaluate_adapters(
    base,
    {"original": adapter.path, "edited": "edited", "control": "control"},
    "results",
    options=EvaluationOptions(eval_data=str(embedded.heldout_file()), fewshot=0, max_samples=16, max_tokens=110),
    engine_options=EngineOptions(engine="transformers", batch_size=64),
)
correct = {name: read_correct(result["predictions_path"]) for name, result in results.items()}
for name, result in results.items():
    print(f"{name:<9}{result['correct']:>3} of {result['total']}")
comparison = compare(correct["original"], correct["edited"])
print(comparison.verdict)

# %% Report
# Spectra before and after, and g by layer and direction, in one HTML file.
write_report("report.html", "The embedded adapter, edited", edited, facts={"mode": policy.mode})
