"""Ours against named peers: same input, same process, alternating, peak memory included."""
