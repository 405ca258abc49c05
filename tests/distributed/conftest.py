"""Ranks are forked from one process that has imported what most of them need: imports take longer than most cases."""

import multiprocessing

multiprocessing.set_forkserver_preload(["tests.distributed.imports"])
