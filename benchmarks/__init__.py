"""Measurements of speed and reach that are run by hand; no test depends on their figures."""
