"""Reports from result files: goals, plots, README's pictures, one report per machine."""
