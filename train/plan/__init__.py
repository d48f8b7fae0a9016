"""``python -m train.plan``: does a run fit a machine, and what will a step cost, before the first minute on it."""
