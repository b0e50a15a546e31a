"""One record of each decision, and its views."""
