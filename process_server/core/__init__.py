"""What the process server decides, without I/O, time or randomness: intake, segmenting, credit, positions, epochs."""
