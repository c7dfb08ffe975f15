"""Whole training steps on CUDA tensors that have shapes, strides and no memory: no GPU needed.

torch's fake tensors carry a device and no numbers. A step on fake tensors of the device `cuda`
takes
every branch that a GPU would make it take: autocast, layouts, the choice of ops. `spy` looks at
each operator on the way and names what a GPU, or the capture of a CUDA graph, would refuse.

What stays unseen: whatever happens inside an op of `engine::` (tests/kernels runs those), numbers,
memory, time, cuDNN.
"""
