# host 1 of 2, the standard input of: ssh -T -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=10 -o ServerAliveCountMax=3 -o ProxyJump=login -p 2222 -- node-a bash -s

export PET_RDZV_ID=0123456789abcdef0123456789abcdef
export TORCH_CPP_LOG_LEVEL=ERROR
export PYTHONPATH=/home/me/moeweave
export PYTHONSAFEPATH=1
export GLOO_SOCKET_IFNAME=eth1
export NCCL_SOCKET_IFNAME=eth1
export NCCL_DEBUG=INFO
export MOEWEAVE_LIFELINE=1
cd -- /home/me/work || exit 2
exec /venv/bin/python -m moeweave.launch.agent --nnodes 2 --nproc-per-node 8 --node-rank 0 --rdzv-endpoint node-a:29400 --max-restarts 3 --log-dir /runs/tiny/submit/0/ranks -m moeweave.launch.train --config /runs/tiny/submit/0/config.yaml

# host 2 of 2, the standard input of: ssh -T -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=10 -o ServerAliveCountMax=3 -o ProxyJump=login -p 2222 -- me@node-b bash -s

export PET_RDZV_ID=0123456789abcdef0123456789abcdef
export TORCH_CPP_LOG_LEVEL=ERROR
export PYTHONPATH=/home/me/moeweave
export PYTHONSAFEPATH=1
export GLOO_SOCKET_IFNAME=eth1
export NCCL_SOCKET_IFNAME=eth1
export NCCL_DEBUG=INFO
export MOEWEAVE_LIFELINE=1
cd -- /home/me/work || exit 2
exec /venv/bin/python -m moeweave.launch.agent --nnodes 2 --nproc-per-node 8 --node-rank 1 --rdzv-endpoint node-a:29400 --max-restarts 3 --log-dir /runs/tiny/submit/0/ranks -m moeweave.launch.train --config /runs/tiny/submit/0/config.yaml
