"""What the ranks of test_elastic.py do."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from moeweave.launch.elastic import start_ranks
from moeweave.launch.failure import RankFailed


def add(folder):
    dist.init_process_group("gloo")
    total = torch.tensor([1.0 + dist.get_rank()])
    dist.all_reduce(total)
    print(f"rank {dist.get_rank()} speaks", flush=True)
    dist.destroy_process_group()
    return total.item()


def raise_while_others_wait(folder):
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ValueError("batch_size=3: must be even. Set batch_size=4.")
    dist.barrier()


def raise_while_others_sleep(folder):
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ValueError("batch_size=3: must be even. Set batch_size=4.")
    time.sleep(600)


def killed(folder):
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def exits(folder):
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        sys.exit("stopped on purpose")
    dist.barrier()


def wait_for_ever(folder):
    dist.init_process_group("gloo")
    Path(folder, f"ready{dist.get_rank()}").write_text(str(os.getpid()))
    if dist.get_rank() == 0:
        dist.barrier()
    time.sleep(600)


def fails_once(folder):
    dist.init_process_group("gloo")
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt == 0 and dist.get_rank() == 1:
        raise ValueError("only the first time")
    dist.barrier()
    return attempt


def main(argv):
    case, restarts = argv[0], int(argv[1]) if len(argv) > 1 else 0
    try:
        value = start_ranks(
            globals()[case],
            os.getcwd(),
            num_ranks=2,
            log_dir=Path("logs"),
            max_restarts=restarts,
            on_cpu="spawn" not in argv,
        )
    except RankFailed as error:
        print(error)
        return 1
    except KeyboardInterrupt as error:
        print(f"interrupted: {error}")
        return 130
    print(f"value {value}")
    return 0
