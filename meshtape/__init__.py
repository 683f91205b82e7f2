"""meshtape."""
