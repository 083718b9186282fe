"""How an image becomes noise and noise an image: the objective, samplers, guidance."""
