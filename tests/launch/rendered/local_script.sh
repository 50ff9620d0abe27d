export PET_RDZV_ID=0123456789abcdef0123456789abcdef
export TORCH_CPP_LOG_LEVEL=ERROR
export PYTHONPATH=/home/me/moeweave
export GLOO_SOCKET_IFNAME=eth1
export NCCL_SOCKET_IFNAME=eth1
export NCCL_DEBUG=INFO
cd -- /home/me/work || exit 2
exec /venv/bin/python -m moeweave.launch.agent --nnodes 1 --nproc-per-node 8 --node-rank 0 --rdzv-endpoint 127.0.0.1:0 --max-restarts 3 --log-dir /runs/tiny/submit/0/ranks /home/me/my.py --lr 3e-4
