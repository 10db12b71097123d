"""Triton kernels for attention from few tags to many image patches."""
