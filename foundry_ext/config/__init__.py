"""YAML files and overrides to a checked configuration, before the slow imports."""
