"""An agent whose ranks are forked, which spares each the seconds of importing torch; all else is the agent's own.

`agent_cases [slow] <the agent's arguments> -m moeweave.launch.train <the program's>`. `slow`: the steps before
the first restart take long enough to lose an agent in them, those before the second for another to join.
"""

import os
import signal
import sys
import time

from moeweave.launch import agent, elastic, env, rank, train, trainer


def main(argv):
    if argv[0] == "slow":
        _slow_until_two_restarts()
        argv = argv[1:]
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    honest = agent._config

    def forking(*arguments):
        config, _, words = honest(*arguments)
        config.start_method = "fork"
        return config, _rank, words[words.index("moeweave.launch.train") + 1 :]

    agent._config = forking
    return agent.main(argv)


def _rank(*words):
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    rank.die_with(int(os.environ["MOEWEAVE_AGENT"]))
    # What a forked function leaves is its value: an agent waits for that of a rank which ended well.
    elastic.leave = lambda code: os._exit(code) if code else None
    if code := train.main(list(words)):
        sys.exit(code)


def _slow_until_two_restarts():
    honest = trainer._step

    def slow(training):
        time.sleep({0: 0.1, 1: 1.5}.get(env.launched_ranks().restarts, 0))
        return honest(training)

    trainer._step = slow
