"""A page that shows runs: curves, tables and adversaries in one HTML file that needs no other."""
