"""The command, its Hydra configuration, run identity and job submission."""
