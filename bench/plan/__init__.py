"""Plans: what fits where, and whether what was planned holds."""
