"""Which of several processes this one is, as torchrun and accelerate say it in the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass

from edgeflow.errors import UsageError


@dataclass(frozen=True)
class Ranks:
    """This process's number among ``world`` processes, and among those of its own host."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """From RANK, WORLD_SIZE and LOCAL_RANK; one process where they are not set. Raises UsageError."""
        try:
            rank, world, local = (
                int(os.environ.get(name, default))
                for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
            )
        except ValueError as error:
            raise UsageError(
                f"environment: RANK, WORLD_SIZE, LOCAL_RANK: expected whole numbers: {error}"
            ) from error
        if not 0 <= rank < world:
            raise UsageError(f"environment: RANK: expected 0 to WORLD_SIZE − 1 = {world - 1}, got {rank}")
        return cls(rank, world, local)
