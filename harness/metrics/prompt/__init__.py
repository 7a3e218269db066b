"""How well images fit their prompts."""
