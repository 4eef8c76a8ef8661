"""One step a command: an open run in, files of the run folder out. Long ones go on where they were stopped."""
