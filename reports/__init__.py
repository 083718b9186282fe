"""Tables and figures: pure functions of records. Nothing here imports torch."""
