"""Real processes on real file systems under real system calls, tormented by a seeded schedule."""
