"""Which modules hurt: sites and groups quantized one at a time, and scores that predict it."""
