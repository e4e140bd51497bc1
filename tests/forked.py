"""Processes forked from a server that has imported the libraries: that takes longer than most of what they do.

The server has computed nothing, so no thread of PyTorch's is lost in a fork. Of this project it has imported nothing.
"""

import multiprocessing

# without hypothesis, which keeps what it finds in the folder that it is imported in
LIBRARIES = ["accelerate", "bitsandbytes", "datasets", "nbformat", "peft", "pytest", "torch", "transformers"]


def fork(target, *arguments):
    """A process that has begun to run target(*arguments)."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(LIBRARIES)
    process = forkserver.Process(target=target, args=arguments)
    process.start()
    return process
