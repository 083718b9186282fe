"""What SLURM needs that submitit does not do: clusters, snapshots of the code, manifests, states."""
