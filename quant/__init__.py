"""Mechanism: tensors in, tensors out."""
