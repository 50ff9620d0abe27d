"""How the watch reads stacks: who waits inside a collective, and where the others are."""

import time

from moeweave.launch import heartbeat, watch

WAITS = """Thread 0x00007f01 (most recent call first):
  File "/x/threading.py", line 331 in wait

Current thread 0x00007f02 (most recent call first):
  File "/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 3000 in all_reduce
  File "/code/launch/trainer.py", line 200 in _any_rank
"""
BUSY = """Current thread 0x00007f02 (most recent call first):
  File "/venv/lib/python3.11/site-packages/numpy/core.py", line 3 in stack
  File "/code/launch/sampler.py", line 48 in batch
  File "/venv/lib/python3.11/site-packages/torch/distributed/fsdp/hooks.py", line 9 in forward
"""


def test_a_rank_inside_a_collective_waits_and_one_elsewhere_does_not():
    assert watch.waits(WAITS)
    assert not watch.waits(BUSY)
    assert watch.where(WAITS) == "/code/launch/trainer.py:200 in _any_rank"
    assert watch.where(BUSY) == "/code/launch/sampler.py:48 in batch"


def test_a_beat_is_read_back_and_a_torn_or_missing_one_is_none(tmp_path):
    heart = heartbeat.Heart(tmp_path, 3, limit=7)
    assert heartbeat.read(tmp_path, 3) is None
    heart.beat(12, "the forward and backward pass")
    heart.beat(13, "x")
    found = heartbeat.read(tmp_path, 3)
    assert (found.step, found.doing, found.limit) == (13, "x", 7)
    assert 0 <= time.monotonic() - found.when < 10
    heart.stop()
    assert heartbeat.read(tmp_path, 3).limit == 0
    assert heartbeat.read(tmp_path, 4) is None
