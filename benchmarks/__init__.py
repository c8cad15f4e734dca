"""A file per stage group, one end to end. Ratios side by side in one run are what counts: machines are noisy."""
