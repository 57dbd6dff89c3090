"""Toy regression beside Hamiltonian Monte Carlo: E19."""
