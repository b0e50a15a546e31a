"""What plugin and pipeline authors test with."""
