"""Our CUDA kernels as Python functions: sources, compiler, launcher, and one module per operation.

Importing anything here needs neither a GPU nor CuPy; `launcher.require_cuda` says what a machine lacks.
Engine thread only, besides the compiler, which any thread may use.
"""
