"""Commands to run before a long run: plan, inspect, verify."""
