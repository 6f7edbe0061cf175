"""Reinforcement learning with verifiable rewards: recipes made of stages, on any engine."""
