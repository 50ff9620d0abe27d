# copied first: rsync --archive --relative -e 'ssh -T -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=10 -o ServerAliveCountMax=3 -i /home/me/.ssh/id' --exclude=.git --exclude=.venv '--exclude=.venv-*' --exclude=__pycache__ --exclude=runs '--exclude=*.pyc' -- /home/me/moeweave/ node-a:/

# copied first: rsync --archive --relative -e 'ssh -T -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=10 -o ServerAliveCountMax=3 -i /home/me/.ssh/id' --exclude=.git --exclude=.venv '--exclude=.venv-*' --exclude=__pycache__ --exclude=runs '--exclude=*.pyc' -- /home/me/work/ node-a:/

# copied first: rsync --archive --relative -e 'ssh -T -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=10 -o ServerAliveCountMax=3 -i /home/me/.ssh/id' -- /runs/tiny/submit/0/ node-a:/

# copied first: rsync --archive --relative -e 'ssh -T -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=10 -o ServerAliveCountMax=3 -i /home/me/.ssh/id' --exclude=.git --exclude=.venv '--exclude=.venv-*' --exclude=__pycache__ --exclude=runs '--exclude=*.pyc' -- /home/me/moeweave/ node-b:/

# copied first: rsync --archive --relative -e 'ssh -T -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=10 -o ServerAliveCountMax=3 -i /home/me/.ssh/id' --exclude=.git --exclude=.venv '--exclude=.venv-*' --exclude=__pycache__ --exclude=runs '--exclude=*.pyc' -- /home/me/work/ node-b:/

# copied first: rsync --archive --relative -e 'ssh -T -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=10 -o ServerAliveCountMax=3 -i /home/me/.ssh/id' -- /runs/tiny/submit/0/ node-b:/

# host 1 of 2, the standard input of: ssh -T -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=10 -o ServerAliveCountMax=3 -i /home/me/.ssh/id -- node-a bash -s

export PET_RDZV_ID=0123456789abcdef0123456789abcdef
export TORCH_CPP_LOG_LEVEL=ERROR
export PYTHONPATH=/home/me/moeweave
export GLOO_SOCKET_IFNAME=eth1
export NCCL_SOCKET_IFNAME=eth1
export NCCL_DEBUG=INFO
export MOEWEAVE_LIFELINE=1
cd -- /home/me/work || exit 2
source /home/me/setup.sh </dev/null || exit 2
exec docker run --rm --interactive --init --network host --ipc host --gpus all --mount type=bind,source=/home/me/work,target=/home/me/work --mount type=bind,source=/runs/tiny,target=/runs/tiny --mount type=bind,source=/home/me/moeweave,target=/home/me/moeweave --env PET_RDZV_ID --env TORCH_CPP_LOG_LEVEL --env PYTHONPATH --env GLOO_SOCKET_IFNAME --env NCCL_SOCKET_IFNAME --env NCCL_DEBUG --env MOEWEAVE_LIFELINE --workdir /home/me/work lab/image:1 /venv/bin/python -m moeweave.launch.agent --nnodes 1:2 --nproc-per-node 8 --node-rank 0 --rdzv-endpoint node-a:29400 --max-restarts 3 --log-dir /runs/tiny/submit/0/ranks /home/me/my.py --lr 3e-4

# host 2 of 2, the standard input of: ssh -T -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=10 -o ServerAliveCountMax=3 -i /home/me/.ssh/id -- node-b bash -s

export PET_RDZV_ID=0123456789abcdef0123456789abcdef
export TORCH_CPP_LOG_LEVEL=ERROR
export PYTHONPATH=/home/me/moeweave
export GLOO_SOCKET_IFNAME=eth1
export NCCL_SOCKET_IFNAME=eth1
export NCCL_DEBUG=INFO
export MOEWEAVE_LIFELINE=1
cd -- /home/me/work || exit 2
source /home/me/setup.sh </dev/null || exit 2
exec docker run --rm --interactive --init --network host --ipc host --gpus all --mount type=bind,source=/home/me/work,target=/home/me/work --mount type=bind,source=/runs/tiny,target=/runs/tiny --mount type=bind,source=/home/me/moeweave,target=/home/me/moeweave --env PET_RDZV_ID --env TORCH_CPP_LOG_LEVEL --env PYTHONPATH --env GLOO_SOCKET_IFNAME --env NCCL_SOCKET_IFNAME --env NCCL_DEBUG --env MOEWEAVE_LIFELINE --workdir /home/me/work lab/image:1 /venv/bin/python -m moeweave.launch.agent --nnodes 1:2 --nproc-per-node 8 --node-rank 1 --rdzv-endpoint node-a:29400 --max-restarts 3 --log-dir /runs/tiny/submit/0/ranks /home/me/my.py --lr 3e-4
