"""Every parser under arbitrary bytes: one registry of targets for the suite's hypothesis tests and for `make fuzz`."""
