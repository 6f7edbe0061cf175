"""Attention that keeps its entropy: parametrisations, temperatures and regularisers for transformers."""
