"""What can be typed: the options of each command of `qvw`, and the step that it calls."""
