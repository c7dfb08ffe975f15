"""Prove the CUDA path on a bare machine with a GPU, in one call: `make gpu-check`, under eight minutes."""
