"""The configuration that the launcher starts from: verl's, with a recipe on top."""
