"""A plan trained: its configuration, calibration, task and rows; and ablations, which are many trainings."""
