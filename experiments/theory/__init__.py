"""Small exact problems behind the papers, a file each: E5, E6, E13, E24, E29 to E33."""
