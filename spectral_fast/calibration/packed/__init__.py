"""Samples of any length packed into rows, and the model's forward pass over such a row."""
