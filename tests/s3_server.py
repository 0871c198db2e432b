"""A real S3 server process (moto's) on a free port of 127.0.0.1, for tests of stores of objects."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import uuid

import pyarrow.fs

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "a-test",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
BUCKET = "checkpoints"

SERVER = """
import ctypes, signal
from moto.server import main
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: tests that are killed leave no server behind
main(["-H", "127.0.0.1", "-p", "0"])
"""


class S3Server:
    """Started when made; `endpoint` is host:port. CREDENTIALS must be in the environment of those who use it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.endpoint = self._announced()
        threading.Thread(target=self.process.stdout.read, daemon=True).start()  # a full pipe would stop it
        self.system = pyarrow.fs.S3FileSystem(
            access_key=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            secret_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
            region=CREDENTIALS["AWS_REGION"],
            endpoint_override=self.endpoint,
            scheme="http",
            allow_bucket_creation=True,
        )
        self.system.create_dir(BUCKET)

    def _announced(self) -> str:
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            found = re.search(r"Running on http://(127\.0\.0\.1:\d+)", line)
            if found:
                return found[1]
        raise RuntimeError(f"the S3 server ended with status {self.process.wait()}: {''.join(lines)}")

    def uri(self, path: str | None = None) -> str:
        """The URI of a place in the bucket; a new one if no path is given."""
        return f"s3://{BUCKET}/{path or uuid.uuid4().hex}?endpoint_override={self.endpoint}&scheme=http"

    def stop(self) -> None:
        """Kills the process, by its id; idempotent."""
        self.process.kill()
        self.process.wait()
