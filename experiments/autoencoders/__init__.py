"""Deep autoencoders on CURVES and MNIST: E1, E2, E12, E14, E15."""
