"""Prove the CUDA path on a bare machine with a GPU: `make gpu-check`, under eight minutes."""
