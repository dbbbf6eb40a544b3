"""Prepared data: rows tokenised once into shards, which training reads window by window."""
