"""Rows to tokenised documents to data loaders."""
