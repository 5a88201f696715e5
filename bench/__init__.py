"""Measurements: ``make bench`` prints them and writes ``bench/RESULTS.md``."""
