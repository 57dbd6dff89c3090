"""Tasks one after another: E24 to E28, E35 and two streams more."""
