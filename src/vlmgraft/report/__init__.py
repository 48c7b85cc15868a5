"""Pictures and tables from rows; no torch."""
