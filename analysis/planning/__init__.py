"""From sensitivities and costs to a bit plan: budgets, ties, accounting, the Pareto front, plans to compare with."""
