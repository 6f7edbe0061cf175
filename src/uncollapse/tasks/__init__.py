"""Verifiable tasks: prompts, answers and verifiers that never execute model output."""
