"""What train.py does: one or several runs, and errors on one line."""
