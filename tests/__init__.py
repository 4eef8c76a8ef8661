"""The tests; a package, so that they can share what they build (plan_frames)."""
