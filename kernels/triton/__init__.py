"""The Triton backend (CUDA): not written yet."""

raise ImportError("the Triton kernels are not written")
