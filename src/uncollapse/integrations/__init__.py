"""One recipe, every engine."""
