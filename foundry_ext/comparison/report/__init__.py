"""The pages, tables and plots that a comparison writes."""
