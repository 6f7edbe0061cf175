"""Small exact systems on which studies run and engines are compared."""
