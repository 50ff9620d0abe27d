"""Where a job can run: one launcher a file, each of which renders what would run and submits it."""
