"""Small exact problems behind the papers: E5, E6, E13, E29 to E33."""
