"""What a person sees while a command runs: progress, short tables, warnings; and Ctrl-C."""
