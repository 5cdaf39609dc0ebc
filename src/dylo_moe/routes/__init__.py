"""Routing seen: which expert a router chooses for which token, task, position and layer, and whether it chooses at all."""
