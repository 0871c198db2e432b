"""Two ranks under torchrun: killed one at a time and restarted, every bit is as without ckptd."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.checkpointer.cases import STEPS
from tests.checkpointer.home import Home

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 110.0


def torchrun(home: Home, module: str, *arguments: str, restarts: int) -> subprocess.CompletedProcess[str]:
    """Two ranks of a module. Each start has its own rendezvous store: torch's shared one keeps keys of the dead."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "-m", module, *arguments]
    environment = {
        **os.environ,
        **home.environment,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def results(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]


def test_killed_ranks_resume_bit_equal(home: Home) -> None:
    """DDP with BatchNorm and FSDP2, even and uneven; eager and lazy capture; rank 1 is killed, then rank 0."""
    ended = torchrun(home, "tests.checkpointer.rank_cases", str(home.folder), restarts=2)
    assert ended.returncode == 0, ended.stderr
    second, third = results(home.folder, "start-1"), results(home.folder, "end")
    for restarted, finished in zip(second, third, strict=True):
        expected = finished["plain"]
        for run in (restarted["eager"], finished["lazy"]):
            restored = run["statistics"]["restored"]
            assert restored["source"] == "memory"
            assert list(map(int, run["losses"])) == list(range(restored["step"] + 1, STEPS + 1))
            assert {step: losses for step, losses in run["losses"].items() if losses != expected["losses"][step]} == {}
            differing = [key for key, value in expected["digest"].items() if run["digest"].get(key) != value]
            assert differing == []
            assert "mutated" not in run["statistics"]["skip_reasons"]
        again = finished["eager"]["statistics"]["restored"]
        assert (again["source"], again["step"]) == ("store", STEPS)
        assert finished["eager"]["losses"] == {}
        assert finished["eager"]["digest"] == restarted["eager"]["digest"]
    for name in ("eager", "lazy"):
        restored = [run[name]["statistics"]["restored"] for run in third]
        assert restored[0]["epoch"] == restored[1]["epoch"]
        assert home.checkpoints(name)[-1] == STEPS
    home.assert_nothing_left()
