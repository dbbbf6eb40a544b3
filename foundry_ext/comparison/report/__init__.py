"""Pages, tables and plots of a comparison."""
