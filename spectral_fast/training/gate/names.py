"""What gates and their parts are called in settings."""

KINDS = ("novelty", "loss_floor", "both", "random")
MODES = ("liberty", "orthonormal")  # of FrequentDirections
SOURCE = "source"  # as the original has it
