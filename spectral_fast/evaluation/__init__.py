"""Evaluation: tasks are pure (prompts, scoring), engines turn prompts into text, comparison is paired."""
