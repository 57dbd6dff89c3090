"""Active learning: how many labels a network needs when it may choose them."""
