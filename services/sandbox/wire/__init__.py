"""How frames and values cross between processes."""
