"""From images to noise and back: the objective, samplers, guidance."""
