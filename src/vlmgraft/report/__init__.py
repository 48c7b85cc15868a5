"""Charts, tables and the HTML report from logged rows; no torch."""
