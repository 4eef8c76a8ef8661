"""Figures: tidy frames in, Axes out; and the panels of them that a run or a page shows."""
