"""Tools for adapters, file to file, without a base model: factors in, factors out, a batch of modules at a time."""
