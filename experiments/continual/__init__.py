"""Tasks one after another: E25, E27, E28, E35 and two streams more."""
