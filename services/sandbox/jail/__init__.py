"""What builds and seals a jail, and forks candidates into it."""
