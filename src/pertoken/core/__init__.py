"""Paper-free and model-free building blocks: budgets, decisions, policies, attachment, traces, costs, cards,
signals."""
