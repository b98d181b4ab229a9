"""What a run leaves on disk so that it, or another job, goes on as if nothing had happened."""
