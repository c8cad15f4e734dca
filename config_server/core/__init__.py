"""What the configuration server decides, without I/O: admission, matching, grants, points, RPO, its clock."""
