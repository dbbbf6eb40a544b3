"""Benchmarks. Each script runs by itself; the other modules are shared by several scripts."""
