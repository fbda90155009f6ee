"""Which contexts live in host memory: opening, sealing, reuse, budgets and eviction."""
