"""Measurements of a backbone: cost, speed, memory and operators. Each is checked against a reference first."""
