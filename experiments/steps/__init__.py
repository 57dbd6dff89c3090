"""Single steps of second-order optimisers, looked at closely: E3, E10, E11, E16 to E18."""
