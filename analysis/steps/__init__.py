"""One step a command: an open run in, files of the run folder out. Long ones resume where they were stopped."""
