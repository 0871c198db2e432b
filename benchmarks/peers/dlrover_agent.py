"""The part of DLRover's agent that Flash Checkpoint needs: what keeps the shared memory and writes it to disk.

`dlrover-run` starts the same in its agent; without master and scheduler this is all that is left of it. Says one line
when it is ready and runs until it is killed.
"""

from __future__ import annotations

import os
import threading


def settle() -> None:
    """Sockets and shared memory under names of this trial and node alone. Before anything of DLRover is made."""
    os.environ["TORCHELASTIC_RUN_ID"] = os.environ["CKPTD_BENCHMARK"] + os.environ.get("CKPTD_NODE", "")
    from dlrover.python.common import multi_process

    multi_process.SOCKET_TMP_DIR = os.environ["CKPTD_RUNTIME_DIR"]


def main() -> None:
    settle()
    from dlrover.python.elastic_agent.torch.ckpt_saver import AsyncCheckpointSaver

    AsyncCheckpointSaver.start_async_saving_ckpt()
    print("{}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
