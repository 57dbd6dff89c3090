"""Data attribution: predicted against measured effects of training examples, and wrong labels found."""
