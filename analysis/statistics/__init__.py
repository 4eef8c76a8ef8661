"""How tensors vary: streamed moments and histograms of each, and networks side by side."""
