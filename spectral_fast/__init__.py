"""spectral_fast: the fast engine for the spectrum of LoRA adapters."""
