"""What several experiments share: data, training, claims."""
