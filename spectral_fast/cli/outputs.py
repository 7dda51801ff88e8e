"""What is in the files that several commands write: name -> contents.

Names are relative to the command's output folder; `*` stands for what varies, and a name that ends with / for a folder
with all that is in it. "--flag FILE" is the file that a flag names. The name `*` alone is what a copy has beside.
"""

from __future__ import annotations

_CONFIG = "PEFT's configuration; ranks and alphas that differ by module are in rank_pattern and alpha_pattern"
NEW_ADAPTER = {
    "adapter_config.json": _CONFIG,
    "adapter_model.safetensors": "the factors, keys ending in lora_A.weight and lora_B.weight",
}
COPY = {
    "adapter_config.json": _CONFIG,
    "adapter_model.safetensors": "the factors in the keys and dtypes of the source; adapter_model.bin if it has that",
    "*": "every other file of the source, unchanged, but .git, .cache and evaluations",
}
SENSITIVITY = {
    "sensitivity.safetensors": "for each module MODULE.sigma, the singular values (r, float64), MODULE.g, their "
    "gradients dL/ds (r, float64), and MODULE.samples, the part of each sample in g (samples x r, float32)",
    "sensitivity.json": "how it was measured: format, modules, all settings, hashes of adapter and data, "
    "samples_used, tokens, labels, dtype, device, stability (shares of the choice that are certain), backends, "
    "versions",
}
GSM8K = {
    "gsm8k_predictions.jsonl": "a problem per line: idx, gold, pred (null: no answer found), correct, generation",
    "eval_config.json": "settings and score: task, split, num_fewshot, decoding, answer_parser, engine, "
    "engine_settings, total_samples, metric (name, score, correct, total, standard_error), timestamp, meta",
}
HUMANEVAL = {
    "samples_*.jsonl": "a program per line: task_id, completion; the name has lora or base",
    "raw_generations_*.jsonl": "the same with its number: task_id, sample_idx, completion",
    "samples_*.jsonl_results.jsonl": "what became of each: task_id, completion, result, passed",
    "per_problem_*.json": "by problem: n_samples, n_correct, pass@k",
    "eval_config.json": "settings and score: task, split, num_fewshot, decoding, engine, engine_settings, sandbox "
    "(isolation and limits: seconds, memory_mb, file_mb, open_files), total_tasks, total_samples, metric (name, score, "
    "standard_error, tasks_with_any_pass), timestamp, meta",
}
OUT_JSON = {"--out_json FILE": "the result that --json prints"}
UNFINISHED = {"OUT_DIR.unfinished/": "beside OUT_DIR while it is computed, for --resume; gone when the result is there"}
