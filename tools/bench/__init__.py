"""Benchmarks of the engine and of the whole service; `python -m tools.bench --help` says which.

Everything here stands outside the package and measures it as a user would: over its public seams, from
other processes where the load is concerned. Each run prints a table and writes JSON and a plot.
"""
