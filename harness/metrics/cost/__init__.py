"""What a trial costs."""
