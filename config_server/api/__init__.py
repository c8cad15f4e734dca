"""The HTTPS face of the configuration server: one table of routes, each with whom it serves, and nobody else."""
