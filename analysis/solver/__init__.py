"""A choice program and its exact solution: reductions, Lagrangian bound, HiGHS. It knows nothing of networks."""
