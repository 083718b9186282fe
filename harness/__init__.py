"""One training, sampling, evaluation and measurement protocol for every backbone."""
