"""Instruments: pure functions on arrays and tensors; no training, no I/O."""
