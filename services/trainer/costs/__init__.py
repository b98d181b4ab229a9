"""What a training takes in memory and time: foretold, measured, and held against each other."""
