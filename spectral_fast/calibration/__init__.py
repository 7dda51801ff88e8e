"""Calibration: rows of text in, sensitivities of singular values out."""
