"""The operator's command line, the demo, and `up`: composes the programs, owns no logic."""
