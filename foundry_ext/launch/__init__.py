"""Implementation of train.py: one or several runs, and errors on one line."""
