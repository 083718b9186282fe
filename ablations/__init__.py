"""The questions: one YAML file a study, and the code that expands one into runs."""
