"""moeweave-submit as it runs on the first of two hosts: in that host's network namespace."""

import os

import namespaces
from moeweave.launch import submit


def main(argv):
    name, *rest = argv
    namespaces.enter(name)
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    return submit.main(rest)
