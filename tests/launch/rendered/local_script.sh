/venv/bin/python -m moeweave.launch.agent --nnodes 1 --nproc-per-node 8 --node-rank 0 --rdzv-endpoint 127.0.0.1:0 --max-restarts 3 --log-dir /runs/tiny/submit/0/ranks /home/me/my.py --lr 3e-4
