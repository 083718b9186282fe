"""Scores of generated images against a reference."""
