"""What an image costs: FLOPs, and the knob of a method that meets a budget."""
