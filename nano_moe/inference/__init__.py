"""Generation from trained runs."""
