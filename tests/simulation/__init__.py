"""The simulation: the real shells and cores under virtual time, with every fault that a seed can bring."""
