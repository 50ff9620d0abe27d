/venv/bin/python -m moeweave.launch.train --config /runs/tiny/submit/0/config.yaml
