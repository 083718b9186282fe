"""What is measured of a backbone: cost, speed, memory, operators; each held against a reference first."""
