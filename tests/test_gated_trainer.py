"""Trainers with a gate: one forward pass, a backward pass and a step only for what is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gated_tools import HIDDEN, SIZES, VOCABULARY, Scripted, arguments, collate, logged, rows, same, trainer, weights
from tiny_models import tiny_llama, with_lora
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from spectral_fast.training import GatedSFTTrainer, GatedTrainer, HeadGradientGate
from spectral_fast.training.gate import Gate, NoveltyAndLossGate, RandomControl
from spectral_fast.training.head import Head


class Calls(TrainerCallback):  # type: ignore[misc]
    """Learning rates and weights after each window."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.weights: list[Tensor] = []

    def on_step_end(self, _: Any, __: Any, ___: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["lr_scheduler"].get_last_lr()[0])
        self.weights.append(torch.cat([p.detach().flatten() for p in kwargs["model"].parameters() if p.requires_grad]))


@pytest.mark.parametrize(
    "more",
    [
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 3, "gradient_checkpointing": True, "max_grad_norm": 0.0},
        {"bf16": True},
        {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
    ],
)
def test_what_accepts_everything_trains_as_the_trainer_without_a_gate(tmp_path: Path, more: dict[str, Any]) -> None:
    plain = trainer(tmp_path, None, **more)
    plain.train()
    asked = trainer(tmp_path, HeadGradientGate(**SIZES, burn_in=100), **more)
    asked.train()
    assert same(weights(plain), weights(asked))
    for key in ("loss", "grad_norm", "learning_rate"):
        assert logged(plain, key) == logged(asked, key)


def test_one_forward_pass_serves_both_and_a_rejection_has_no_backward_pass(tmp_path: Path) -> None:
    made = trainer(tmp_path, Scripted("ynn"), gradient_accumulation_steps=2)
    forward, backward = [], []
    layer = made.model.get_base_model().model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda *_: forward.append(1))
    layer.lora_B["default"].weight.register_hook(lambda _: backward.append(1))
    made.train()
    assert (len(forward), len(backward)) == (8, 3)
    assert made.gate.accepted_count == 3
    assert made.history.accepts == [True, False, False, True, False, False, True, False]


def test_a_rejected_window_moves_neither_weights_nor_schedule(tmp_path: Path) -> None:
    calls = Calls()
    made = trainer(tmp_path, Scripted("ynny"), weight_decay=0.1, max_steps=8)
    made.add_callback(calls)
    made.train()
    moved = [not torch.equal(a, b) for a, b in zip(calls.weights, calls.weights[1:], strict=False)]
    assert moved == [False, False, True, True, False, False, True]
    assert calls.rates == pytest.approx([1e-2 * (1 - n / 8) for n in (1, 1, 1, 2, 3, 3, 3, 4)])
    assert {int(state["step"]) for state in made.optimizer.state.values()} == {4}
    assert len(logged(made, "grad_norm")) == 4
    assert made.history.optimizer_steps == 4


def test_a_window_takes_the_mean_over_the_tokens_of_what_was_accepted(tmp_path: Path) -> None:
    data = rows(8)
    made = trainer(
        tmp_path,
        Scripted("ynyn"),
        data,
        gradient_accumulation_steps=4,
        max_steps=1,
        train_sampling_strategy="sequential",
    )
    made.train()
    kept = trainer(
        tmp_path,
        None,
        data[:2] + data[4:6],
        gradient_accumulation_steps=2,
        max_steps=1,
        train_sampling_strategy="sequential",
    )
    kept.train()
    assert logged(made, "grad_norm") == pytest.approx(logged(kept, "grad_norm"), rel=1e-5)
    assert same(weights(made), weights(kept), rtol=1e-4)


def test_means_of_micro_batches_are_averaged_where_a_trainer_counts_no_tokens(tmp_path: Path) -> None:
    class ByBatches(Trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = False

    from spectral_fast.training import gated

    data = rows(8)
    args = arguments(tmp_path, gradient_accumulation_steps=4, max_steps=1, train_sampling_strategy="sequential")
    made = gated(ByBatches)(
        with_lora(tiny_llama()), args, data_collator=collate, train_dataset=data, gate=Scripted("nyyn")
    )
    made.train()
    args = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=1, train_sampling_strategy="sequential")
    kept = ByBatches(with_lora(tiny_llama()), args, data_collator=collate, train_dataset=data[2:6])
    kept.train()
    assert same(weights(made), weights(kept), rtol=1e-4)


def test_the_loss_in_the_logs_is_that_of_all_micro_batches(tmp_path: Path) -> None:
    rate = {"learning_rate": 0.0, "gradient_accumulation_steps": 2}
    plain, made = trainer(tmp_path, None, **rate), trainer(tmp_path, Scripted("nny"), **rate)
    done = [t.train().training_loss for t in (plain, made)]
    assert logged(made, "loss") == logged(plain, "loss")
    assert done[0] == done[1]


def test_the_gate_is_shown_what_enters_and_leaves_the_output_embedding(tmp_path: Path) -> None:
    gate = Scripted("y")
    made = trainer(tmp_path, gate, max_steps=1, train_sampling_strategy="sequential")
    batch = collate(rows()[:2])
    with torch.no_grad():
        wanted = made.model.eval()(**batch, output_hidden_states=True)
    made.train()
    loss, hidden, logits, labels = gate.shown[0]
    assert loss == pytest.approx(wanted.loss.item(), rel=1e-6)
    assert torch.equal(labels, batch["labels"])
    torch.testing.assert_close(hidden, wanted.hidden_states[-1])
    torch.testing.assert_close(logits, wanted.logits)
    assert (hidden.requires_grad, logits.requires_grad) == (False, False)
    assert made._head.hidden is None  # nothing is held between steps


@pytest.mark.parametrize(
    "config", [{}, {"final_logit_softcapping": 2.0}, {"logit_scale": 0.25}, {"logits_scaling": 3.0}]
)
def test_logits_that_are_not_formed_are_told_by_the_weight(config: dict[str, float]) -> None:
    from trl.trainer import utils

    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("this TRL has no add_fused_lm_head; 1.14.2 has none yet")
    model = tiny_llama()
    for name, value in config.items():
        setattr(model.config, name, value)
    utils.add_fused_lm_head(model)
    head, batch = Head(with_lora(model)), collate(rows()[:2])
    with head.watch():
        told = model(**batch, fused_lm_head=True)
        hidden, logits = head.seen(whole=bool(config))
        weight = head.seen(whole=False)[1]
    assert (weight is model.lm_head.weight or weight.shape == (VOCABULARY, HIDDEN)) == (not config)
    if not config:
        logits = hidden @ logits.mT
    gold = batch["labels"][:, 1:]
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, gold.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(chosen.masked_fill(gold < 0, 0), told.log_probs, rtol=1e-4, atol=1e-5)


def sft(out: Path, gate: Gate, **more: Any) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2")
    text = [" ".join(f"w{i}" for i in row["input_ids"]) for row in rows()]
    data = Dataset.from_dict({"prompt": [x[:8] for x in text], "completion": [x[8:] for x in text]})
    args = SFTConfig(**{**arguments(out, **more).to_dict(), "bf16": False, "max_length": 32})
    return GatedSFTTrainer(with_lora(tiny_llama()), args, train_dataset=data, processing_class=fast, gate=gate)


def test_trls_trainer_takes_a_gate_without_forming_logits(tmp_path: Path) -> None:
    gate = HeadGradientGate(**SIZES, target_novelty=0.5, burn_in=2, k_topk=VOCABULARY)
    made = sft(tmp_path, gate, max_steps=8, gradient_accumulation_steps=2)
    seen = []
    gate_embed = gate.embed_from_weight
    gate.embed_from_weight = lambda *given: seen.append(given) or gate_embed(*given)  # type: ignore[method-assign, func-returns-value]
    made.train()
    assert len(seen) == 16
    hidden, weight, labels = seen[0]
    torch.testing.assert_close(gate_embed(hidden, weight, labels), gate.embed(hidden, hidden @ weight.mT, labels))
    assert made.history.accepts.count(False) > 0
    assert made.history.accepts[:2] == [True, True]
    assert (tmp_path / "gate_metrics.json").is_file()


def test_all_choices_of_the_original_work_in_trls_trainer_too(tmp_path: Path) -> None:
    gate = HeadGradientGate(**SIZES, target_novelty=0.5, burn_in=2, compat="source")
    made = sft(tmp_path, gate, max_steps=4)
    made.train()
    assert made.history.novelties[0] == 1
    assert all(0 < novelty < 1 for novelty in made.history.novelties[1:])


def test_a_resumed_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def made(out: str, **more: Any) -> Any:
        gate = NoveltyAndLossGate(**SIZES, target_novelty=0.6, burn_in=2, seed=3)
        how = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 5, "max_steps": 10, **more}
        return trainer(tmp_path / out, gate, model=with_lora(tiny_llama(), lora_dropout=0.2), **how)

    checkpoint = str(tmp_path / "whole" / "checkpoint-5")
    whole, later = made("whole"), made("later")
    whole.train()
    later.train(resume_from_checkpoint=checkpoint)
    assert same(weights(whole), weights(later))
    assert 0 < sum(whole.history.accepts) < len(whole.history.accepts) == 20
    assert vars(whole.history) == vars(later.history)
    states = [json.dumps(t.gate.state_dict(), default=lambda x: x.tolist()) for t in (whole, later)]
    assert states[0] == states[1]
    last = [t.state.log_history[-2]["loss"] for t in (whole, later)]
    assert last[0] == last[1]
    other = NoveltyAndLossGate(**SIZES, seed=4)
    with pytest.raises(ValueError, match="is of another gate: the gate was made with seed = 3, this one has 4; give"):
        trainer(tmp_path / "x", other).train(resume_from_checkpoint=checkpoint)
    for kind in (RandomControl(0.5), HeadGradientGate(**SIZES, seed=3)):
        told = f"the state is of a NoveltyAndLossGate, this gate is a {type(kind).__name__}"
        with pytest.raises(ValueError, match=told):
            trainer(tmp_path / "x", kind).train(resume_from_checkpoint=checkpoint)


def test_a_checkpoint_without_a_gate_is_not_gone_on_from(tmp_path: Path) -> None:
    trainer(tmp_path, None, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-1 has no gate\.pt: it is of a training without a gate"):
        trainer(tmp_path, Scripted("y")).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_metrics_are_logged_and_written_under_their_names(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        HeadGradientGate(**SIZES, burn_in=1, target_novelty=0.5),
        max_steps=6,
        save_strategy="steps",
        save_steps=4,
    )

    class AtSave(TrainerCallback):  # type: ignore[misc]
        def on_save(self, *_: Any, **__: Any) -> None:
            seen.append(json.loads((tmp_path / "gate_metrics.json").read_text())["total_steps"])

    seen: list[int] = []
    made.add_callback(AtSave())
    made.train()
    assert seen == [4, 6]
    names = {
        "novelty",
        "novelty_avg",
        "accept",
        "acceptance_rate",
        "accepted_steps",
        "total_steps",
        "current_novelty_threshold",
    }
    first = {"d_hidden", "m", "k", "target_novelty", "novelty_scaler", "novelty_ema_rate", "burn_in"}
    entries = [e for e in made.state.log_history if "loss" in e]
    assert all({f"gate/{name}" for name in names} <= set(entry) for entry in entries)
    assert [sum(f"gate/{name}" in e for e in entries) for name in sorted(first)] == [1] * 7
    written = json.loads((tmp_path / "gate_metrics.json").read_text())
    accepts, novelties = written["accept_history"], written["novelty_history"]
    assert written["total_steps"] == len(accepts) == len(novelties) == len(written["loss_history"]) == 6
    assert written["accepted_steps"] == sum(accepts) == made.gate.accepted_count
    assert written["rejected_steps"] == 6 - sum(accepts)
    assert written["acceptance_rate"] == sum(accepts) / 6 == made.gate.acceptance_rate()
    assert written["avg_novelty"] == pytest.approx(sum(novelties) / 6)
    assert entries[-1]["gate/novelty"] == novelties[-1]
    assert not list(tmp_path.glob(".*"))


def test_a_training_ends_after_the_optimizers_steps_and_its_schedule_with_it(tmp_path: Path) -> None:
    made = trainer(tmp_path, Scripted("yn"), limit=3, max_steps=50, save_strategy="steps", save_steps=50)
    calls = Calls()
    made.add_callback(calls)
    assert made.train().global_step == 5
    assert calls.rates[-1] == 0
    assert len(logged(made, "loss")) == 5
    again = trainer(tmp_path, Scripted("yn"), limit=3, max_steps=50)
    with pytest.raises(ValueError, match=r"checkpoint-5 has 3 of max_optimizer_steps = 3: it is the end already"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"the training diverged: the loss is nan after step [12]; lower learning_rate, "
    ):
        trainer(tmp_path, RandomControl(0.99, burn_in=9), learning_rate=1e30).train()


def test_what_does_not_go_with_a_gate_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="made for d_hidden = 48, vocab_size = 96; the model has 48, 97"):
        trainer(tmp_path, HeadGradientGate(HIDDEN, VOCABULARY - 1))
    with pytest.raises(TypeError, match="gate must be a Gate, such as HeadGradientGate; got 3"):
        GatedTrainer(gate=3)
    with pytest.raises(ValueError, match="auto_find_batch_size does not go with a gate"):
        trainer(tmp_path, Scripted("y"), auto_find_batch_size=True)
    bare = [{"input_ids": torch.tensor(row["input_ids"][:6])} for row in rows()]
    with pytest.raises(ValueError, match="a gate wants labels; the batch has input_ids"):
        GatedTrainer(with_lora(tiny_llama()), arguments(tmp_path), train_dataset=bare, gate=Scripted("y")).train()
    with pytest.raises(ValueError, match="Linear has not both"):
        Head(SimpleNamespace(get_base_model=Linear))
    with pytest.raises(ValueError, match="BartForConditionalGeneration has an encoder"):
        Head(BartForConditionalGeneration(BartConfig(vocab_size=9, d_model=16, encoder_layers=1, decoder_layers=1)))
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(
        RuntimeError, match="a gated training is one process per GPU, plain or DDP; this is one process"
    ):
        trainer(tmp_path, Scripted("y"))


class Linear:
    """A model with nothing before it."""

    base_model = None

    def get_output_embeddings(self) -> None:
        return None


def test_a_scaler_of_gradients_is_left_alone_by_a_rejected_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As fp16 on a GPU has one: it may be asked for a step only after gradients."""

    def ended(scaler: Any) -> Any:
        made = trainer(tmp_path, Scripted("nyyn"), max_steps=8)
        made.accelerator.scaler, made.accelerator.native_amp = scaler, scaler is not None
        made.train()
        return made

    plain = ended(None)
    monkeypatch.setattr("accelerate.Accelerator.mixed_precision", "fp16")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    scaled = ended(scaler)
    assert scaler.get_scale() == 4096.0  # grown after each two of the four steps
    assert logged(scaled, "learning_rate") == logged(plain, "learning_rate")
    assert logged(scaled, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=0.02)  # the model was fp16
