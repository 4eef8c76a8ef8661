"""Measurement: models and images in, tables and figures out."""
