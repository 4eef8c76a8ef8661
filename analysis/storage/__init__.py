"""The run folder on the disk: files written whole, locks, the record of each step, tables checked when read back."""
