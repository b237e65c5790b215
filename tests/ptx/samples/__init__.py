"""Kernels for the machine to run: CUDA C++ and Triton."""
