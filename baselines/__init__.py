"""Rival backbones, which follow the same protocol."""
