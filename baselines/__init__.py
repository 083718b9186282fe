"""Rival backbones behind the same protocol."""
