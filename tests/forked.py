"""Start a process from a fork server that has already imported the libraries, because importing takes long.

The server has computed nothing, so a fork cannot lose a thread of PyTorch.
It has imported nothing of this project.
"""

import multiprocessing

LIBRARIES = ["accelerate", "datasets", "pytest", "torch", "transformers"]


def fork(target, *arguments):
    """Start a process that runs target(*arguments), and return it."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(LIBRARIES)
    process = forkserver.Process(target=target, args=arguments)
    process.start()
    return process
