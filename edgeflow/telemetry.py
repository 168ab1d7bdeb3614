"""edgeflow reports to nobody, and keeps what it uses from doing so.

OpenVINO's packages report their import and every conversion over the network unless the user has opted out,
from forks of the process that count its memory twice. Jobs of continuous integration they leave alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_telemetry() -> Iterator[None]:
    """OpenVINO takes this process for a job of continuous integration while the block runs."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before
