"""Load on running services: many annotators, open loop, and ten times more of them than there is room for."""
