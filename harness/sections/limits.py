"""Limits of values. What is larger is a slip of the keyboard that would fill the memory or never end."""

MOST_STEPS = 99_999_999  # names of checkpoints have eight digits
MOST_SAMPLES = 10_000_000
MOST_AT_ONCE = 100_000  # images
MOST_SIDE = 16_384  # pixels or latents
MOST_MOMENTS = 10_000
MOST_WORKERS = 256
MOST_NAME = 200  # bytes of data.name, which is part of a folder's name
