"""LS-LoRA: a learned spline after every LoRA branch, y = W x + s_out φ(s_in clamp(scaling B A x)).

It starts as the identity, costs K + 2 parameters per layer, and is a method of PEFT's once `spectral_fast.lslora` is
imported. Its update is no product of two matrices, so it cannot be merged, probed or edited.
"""

# %% Train
# As any adapter, by keys of a section `spline` (or flags); the penalty on the values is added to the loss. A few steps.
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from spectral_fast import embedded
from spectral_fast.lslora import read_splines, spline_parameters, spline_penalty, splines_of
from spectral_fast.report.splines import save_spline_picture
from spectral_fast.training import load, train

base = embedded.base_model_dir()
settings = {
    "model_name_or_path": str(base),
    "train_dataset_path": str(embedded.calibration_file()),
    "train_samples": 32,
    "lora_r": 4,
    "lora_target_modules": ["q_proj", "down_proj"],
    "use_spline": True,
    "num_knots": 7,
}
words = ["--max_steps", "8", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--output_dir", "trained"]
words += ["--gradient_checkpointing", "false", "--report_to", "none", "--save_strategy", "no"]
result = train(load(None, settings, words))
print(f"{result['splines']['parameters']} of {result['trainable_parameters']:,} parameters are of splines")

# %% What was learnt
# How far each is from the identity, read from the file without the base model.
splines = read_splines("trained/final_checkpoint")
for name, spline in list(splines.items())[:3]:
    print(f"{name}: mean |v - k| {spline.deviation:.4f}, scales {spline.input_scale:.3f} and {spline.output_scale:.3f}")
save_spline_picture("splines.png", splines)

# %% In a model
# PEFT loads it; the penalty is there for loops of one's own.
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "trained/final_checkpoint")
print(f"{sum(p.numel() for p in spline_parameters(model))} parameters, penalty {float(spline_penalty(model)):.1e}")
assert splines_of(model).keys() == splines.keys()

# %% As a function
# A spline of its own: what becomes of a branch's output z.
one = next(iter(splines.values()))
z = torch.linspace(-2, 2, 5)
print([round(y, 3) for y in one(z).tolist()], "instead of", z.tolist())
