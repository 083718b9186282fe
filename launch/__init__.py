"""The command, its Hydra configuration, plans of studies, and job submission."""
