"""Kernels of elastic-moe: every op as a readable PyTorch reference and as native code.

ops        single kernels, by the implementation that a caller names
reference  the same in PyTorch: any device, differentiable; fast paths are tested against it
step       a whole model in C++, one call per step
training   half layers, the loss and Muon in C++, forward and backward
table      what each sub-network of a batch may use
packing    weights as the C++ kernels read them; `kv_blocks`, keys and values
native     loads the C++ extension and chooses its instruction-set level; `constants`, the
           numbers that it shares with Python

The C++ is in csrc/ under the same names: ops/route.h, ops/experts.h, step/, training/.
"""
