"""One training in several processes: who they are, what each holds, what they tell each other."""
