"""Inner training in plain PyTorch: no gymnasium, no YAML, no files."""
