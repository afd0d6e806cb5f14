"""What to train when only a budget is given: how fast this machine is, and how far that gets each recipe."""
