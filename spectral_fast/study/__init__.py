"""The SVD study: how well do cheap scores find what matters in a weight, an adapter, an activation?

`toy` and `predictors` reconstruct random and real weights from a part of them, `prune_finetune` prunes the channels of
a LoRA between two phases of training, `active_channels` predicts which channels of a layer are active.

Inspired by Khaki et al., "SparseLoRA: Accelerating LLM Fine-Tuning with Contextual Sparsity", arXiv:2506.16500.
"""
