"""Learning gates over singular directions, and what it needs."""
