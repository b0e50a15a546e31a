"""Configuration: the vocabulary of a fleet file, YAML with positions, findings."""
