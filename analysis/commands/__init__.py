"""What can be typed: options, and the commands of `qvw` with many of them; the rest are in `analysis.cli`."""
