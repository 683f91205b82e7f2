"""Kernels written for CUDA, beside the plain ones of the op table, which are their oracles."""
