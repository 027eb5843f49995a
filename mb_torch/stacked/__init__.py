"""What every backend shares: optimizers over stacks, arguments of all models, and how they are split into parts."""
