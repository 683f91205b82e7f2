"""One CUDA device: array module, compiled kernels, GEMMs, cuDNN, graphs. CuPy is imported when asked for."""
