"""What runs beside the candidate in its process: a convenience whose honesty nobody assumes."""
