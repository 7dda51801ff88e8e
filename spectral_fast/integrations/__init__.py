"""Faster insides for other tools: their own functions, with the compact route where the result is the same."""
