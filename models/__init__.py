"""The backbone protocol, the registry of presets, shared layers, mixers and LaMamba-Diff."""
