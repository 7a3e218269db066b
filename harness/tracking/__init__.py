"""Results in MLflow. Only `client` and what it opens talk to it."""
