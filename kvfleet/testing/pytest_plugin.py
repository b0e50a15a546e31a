"""The pytest plugin that collects pipeline tests from YAML files."""
