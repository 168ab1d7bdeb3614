"""Which of several processes this one is, as torchrun and accelerate say it in the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass

from edgeflow.errors import UsageError


@dataclass(frozen=True)
class Ranks:
    """This process's number among ``world`` processes that need not know each other otherwise.

    Not parallel.Processes: that one joins a process group, where each waits for all the others. Drawing pairs
    only divides shards by number: a process may be killed, or started again alone, while the others go on.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """From RANK and WORLD_SIZE; one process where they are not set. Raises UsageError."""
        given = [os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))]
        try:
            rank, world = map(int, given)
        except ValueError as error:
            raise UsageError(f"environment: RANK, WORLD_SIZE: expected whole numbers, got {given}") from error
        if not 0 <= rank < world:
            raise UsageError(f"environment: RANK: expected 0 to WORLD_SIZE − 1 = {world - 1}, got {rank}")
        return cls(rank, world)
