"""The C++ backend (CPU): not built yet."""

raise ImportError("the native kernels are not built")
