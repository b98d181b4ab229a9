"""Memory of GPUs as something that is leased: what there is, who may take how much of it, whose turn is next."""
