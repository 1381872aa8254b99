"""Kernels of elastic-moe: every op as a readable PyTorch reference and as native code.

ops        the face: `route(...)` picks an implementation by name
reference  PyTorch, any device, differentiable; the definition of what is right
cpu        C++17, compiled per instruction set and chosen at run time
"""
