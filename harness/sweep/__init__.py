"""From a sweep file to trials: read, checked, completed."""
