"""A node of its own for each test: a runtime directory, stores, and the processes that belong to it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil

from ckptd.daemon.client import Control, jobs
from tests.checkpointer.training import until

LINGER_S = 60.0
"""What a failed test leaves behind goes by itself."""


class Home:
    """`runtime` holds the daemons of the test; `store()` names places for checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runtime = folder / "runtime"

    @property
    def environment(self) -> dict[str, str]:
        """What a process on this node must have in its environment."""
        return {"CKPTD_RUNTIME_DIR": str(self.runtime), "CKPTD_LINGER_S": str(LINGER_S)}

    def store(self, name: str = "store") -> str:
        return str(self.folder / name)

    def checkpoints(self, name: str = "store") -> list[int]:
        """Steps of the committed checkpoints of a store."""
        folders = (self.folder / name).glob("step-*/COMMIT")
        return sorted(int(folder.parent.name.split(".")[0].removeprefix("step-")) for folder in folders)

    def processes(self) -> list[psutil.Process]:
        """Daemons and keepers of this node that run now. Those whose end nobody has collected have no environment any
        more, and are none: the machine's first process may take seconds for that."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                here = process.environ().get("CKPTD_RUNTIME_DIR") == str(self.runtime)
                command = " ".join(process.cmdline())
                if here and process.pid != os.getpid() and ("ckptd.daemon" in command or "keeper.py" in command):
                    found.append(process)
        return found

    def daemon(self) -> psutil.Process:
        """The only daemon here."""
        (found,) = [process for process in self.processes() if "ckptd.daemon" in process.cmdline()[:3]]
        return found

    def stop(self) -> None:
        """`ckptd stop` for every job here; nothing is left afterwards."""
        for job in jobs():
            control = Control.connect(job.name)
            control.stop()
            control.close()
        self.assert_nothing_left()

    def assert_nothing_left(self) -> None:
        """No daemon, no keeper, no file of theirs."""
        until(lambda: not self.processes(), lambda: f"still there: {self.processes()}\n{self.logs()}")
        assert not self.runtime.exists(), f"left behind: {sorted(self.runtime.rglob('*'))}\n{self.logs()}"

    def logs(self) -> str:
        """What the daemons here have said."""
        return "\n".join(log.read_text() for log in self.runtime.glob("*/log"))

    def kill(self) -> None:
        """The end of a test that failed."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
