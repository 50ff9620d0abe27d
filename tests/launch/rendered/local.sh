export PET_RDZV_ID=0123456789abcdef0123456789abcdef
export TORCH_CPP_LOG_LEVEL=ERROR
export PYTHONPATH=/home/me/moeweave
export PYTHONSAFEPATH=1
export GLOO_SOCKET_IFNAME=eth1
export NCCL_SOCKET_IFNAME=eth1
export NCCL_DEBUG=INFO
cd -- /home/me/work || exit 2
exec /venv/bin/python -m moeweave.launch.train --config /runs/tiny/submit/0/config.yaml
