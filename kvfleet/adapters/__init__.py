"""The wires: one adapter for each kind of engine."""
