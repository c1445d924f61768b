"""Triton kernels: this folder is installed as `musicgen_fast.kernels` (see `package_dir` in setup.py).

Kernels take tensors and ints, never configs: nothing here imports `musicgen_fast`. Inside the folder imports are
relative, because `kernels` at the top level is the name of another package on PyPI. Triton is imported by the modules
that launch kernels, not by this file, so that a machine without a GPU can import the package.
"""
