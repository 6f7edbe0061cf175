"""Activation checkpointing computes parts of the forward pass a second time, within the backward pass."""

from __future__ import annotations

import torch


def recomputing() -> bool:
    """Whether a backward pass is running: what is computed now, activation checkpointing computes for the second time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
