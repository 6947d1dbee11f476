"""Studies: a published claim, the runs that test it, and a verdict by a rule fixed before them."""
