"""Pallas kernels for TPU and GPU: tree attention in rows, and attention over pages."""
