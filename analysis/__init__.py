"""Measurement: models and images in, tables and figures out.

The files here are those that other people import: `models`, `data`, `sites`, `runs`, `running_stats`, `tensor_stats`,
`variation`, `sensitivity`, `replay`, `proxies`, `cost`, `planner`, `plots`, `report`. The folders hold what they are
made of; each imports only folders before it: `terminal`, `inputs`, `storage`, `statistics`, `sweeps`, `solver`,
`planning`, `session`, `training`, `figures`, `page`, `steps`, `commands`.
"""
