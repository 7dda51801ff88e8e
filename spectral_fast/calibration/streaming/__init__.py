"""Calibration of a base model larger than memory: its weights come and go, one decoder layer at a time."""
