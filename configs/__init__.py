"""What the programs read: Hydra groups, YAML only."""
