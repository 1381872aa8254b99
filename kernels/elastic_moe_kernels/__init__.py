"""Kernels of elastic-moe: every op as a readable PyTorch reference and as native code.

ops        the face: `route(...)`, `experts(...)` and so on pick an implementation by name
reference  PyTorch, any device, differentiable; the definition of what is right
cpu        C++17, compiled per instruction set and chosen at run time; `cpu_ops` are its kernels
step       a whole model in C++, one call per step
packing    weights as the kernels read them; `kv_blocks`, keys and values
"""
