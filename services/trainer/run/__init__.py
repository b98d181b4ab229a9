"""The run itself: steps, and what watches and measures them."""
