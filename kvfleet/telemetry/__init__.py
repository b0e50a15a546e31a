"""What we measure and know of the fleet: health, prices, limits, metrics."""
