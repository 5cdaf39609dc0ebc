"""Experts compared: who passes what, who is like whom, and whether the router chooses well."""
