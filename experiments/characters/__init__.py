"""A small language model of characters, trained by several optimisers to one validation loss."""
