"""A placeholder that the memory module of another branch replaces."""


def reuse_freed_memory(enabled: bool = True) -> None:
    """Nothing yet."""
