"""What a sweep asks for: its arms, the space of each, budgets, packs, and the plan of what it will cost."""
