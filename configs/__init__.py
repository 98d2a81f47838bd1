"""Experiment descriptions: one file a recipe, each with its command and expected result."""
