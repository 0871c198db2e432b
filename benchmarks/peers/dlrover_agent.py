"""The part of DLRover's agent that Flash Checkpoint needs: what keeps the shared memory and writes it to disk.

`dlrover-run` starts the same in its agent; without master and scheduler this is all that is left of it. Prints a line
when it is ready, and one for each line it reads, which tells it that the ranks are about to be started anew.
"""

from __future__ import annotations

import os
import sys


def settle() -> None:
    """Sockets and shared memory under names of this trial and node alone. Before anything of DLRover is made."""
    os.environ["TORCHELASTIC_RUN_ID"] = os.environ["CKPTD_BENCHMARK"] + os.environ.get("CKPTD_NODE", "")
    from dlrover.python.common import multi_process

    multi_process.SOCKET_TMP_DIR = os.environ["CKPTD_RUNTIME_DIR"]


def main() -> None:
    settle()
    from dlrover.python.elastic_agent.torch.ckpt_saver import AsyncCheckpointSaver

    AsyncCheckpointSaver.start_async_saving_ckpt()
    print("ready", flush=True)
    for _ in sys.stdin:
        AsyncCheckpointSaver.reset()  # dead ranks may hold locks
        print("ready", flush=True)


if __name__ == "__main__":
    main()
