"""Helpers that every room may use. They need the standard library alone, and never import torch."""
