"""Programs: the only place that reads the command line, the environment and YAML."""
