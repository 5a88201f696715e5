"""Kills one part of the service after another and looks what becomes of the jobs; `make chaos` runs it."""
