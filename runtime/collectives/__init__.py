"""Collectives between the workers of a mesh: one interface (base), several transports behind it."""
