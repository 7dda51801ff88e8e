"""Train on what is new only: a gate looks at a micro-batch's forward pass and may skip its backward pass (SLoRA).

Two trainings of 24 steps by TRL, with and without a gate, and a trainer of one's own. Far too short to say whether the
gate chooses well; a gate that accepts at random is the control for that (`slora_gate: random`).
"""

# %% The settings
# The same keys as in `spectral-fast train --config train.yaml`, with TRL's SFTConfig as flags.
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments

from spectral_fast import embedded
from spectral_fast.report.gated import analyze
from spectral_fast.training import GatedTrainer, HeadGradientGate, load, train

base = embedded.base_model_dir()
settings = {
    "model_name_or_path": str(base),
    "train_dataset_path": str(embedded.calibration_file()),
    "train_samples": 64,
    "lora_r": 4,
    "slora_enable": False,
}
words = ["--max_steps", "24", "--per_device_train_batch_size", "2", "--learning_rate", "1e-3", "--logging_steps", "4"]
words += ["--gradient_checkpointing", "false", "--report_to", "none", "--save_strategy", "no"]

# %% Without a gate
plain = train(load(None, settings, [*words, "--output_dir", "plain"]))
print(f"all {plain['steps']} micro-batches, loss {plain['train_loss']:.3f}")

# %% With a gate
# It accepts everything in the burn-in, and then a share of about 0.5, preferring gradients that go where few went.
gate = {"slora_enable": True, "slora_target_novelty": 0.5, "slora_burn_in": 4, "slora_novelty_ema_rate": 0.3}
gated = train(load(None, settings | gate, [*words, "--output_dir", "gated"]))
print(
    "{accepted_steps} of {total_steps} micro-batches accepted, loss {loss:.3f}".format(
        loss=gated["train_loss"], **gated["gate"]
    )
)
analysis = analyze("plain", "gated", "reports/analysis.md")
print(analysis["verdict"])

# %% A trainer of one's own
# `GatedTrainer` is transformers' Trainer with a gate; `gated(YourTrainer)` makes one of any subclass of it.
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(2, 100, (32, 24))]
novelty = HeadGradientGate(d_hidden=256, vocab_size=100, target_novelty=0.5, burn_in=4)
how = TrainingArguments(
    "own", max_steps=8, per_device_train_batch_size=4, use_cpu=True, report_to="none", disable_tqdm=True
)
trainer = GatedTrainer(peft, how, train_dataset=rows, gate=novelty)
trainer.train()
print(f"accepted {novelty.acceptance_rate():.0%}; novelties {[round(x, 2) for x in trainer.history.novelties]}")
