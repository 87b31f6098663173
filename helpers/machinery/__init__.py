"""What runs the course but is not needed to follow it."""
