"""What a training may be told, each key known or refused."""
