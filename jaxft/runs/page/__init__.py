"""The report of runs: one HTML page without any other file, see document.py."""
