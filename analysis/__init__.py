"""Measurement: models and images in, tables and figures out.

The files here are one for each thing that the workbench does: `models`, `data`, `sites`, `evaluation`, `runs`,
`running_stats`, `tensor_stats`, `variation`, `sensitivity`, `replay`, `proxies`, `cost`, `planner`, `plots`, `report`,
`notebook_runs`, `cli`. The folders hold what they are made of; each imports only folders before it: `terminal`,
`inputs`, `storage`, `statistics`, `sweeps`, `solver`, `planning`, `session`, `training`, `figures`, `page`, `steps`,
`commands`.
"""
