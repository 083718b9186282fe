"""The studies, one YAML file each, and the code that expands a study into runs."""
