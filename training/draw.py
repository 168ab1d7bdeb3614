"""Random draws of a step's whole batch, of which each process and each micro-batch takes its rows.

Every process holds the same random state and draws the global batch, so a run gives the same numbers
however its batch is split: on one process or eight, in one piece or in gradient accumulation's pieces.
Drawing is cheap beside a network; nothing has to be sent around.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgeflow.errors import ConfigError


class Draw:
    """What an objective draws a batch with, from the device's default generator.

    Made by an objective as ``self.draw = Draw(batch_size, device)``; the training loop then calls
    :meth:`share`. Every method returns this piece's ``size`` rows of a draw for ``batch_size`` rows. Within a
    step a second and later piece must ask for the same draws in the same order as the first.
    """

    def __init__(self, batch_size: int, device: torch.device):
        self.batch_size, self.device = batch_size, device
        self.count = 0  # examples that :meth:`index` chooses from
        self.chosen: Tensor | None = None  # int64 (batch_size,): the whole batch of the step
        self.only: Tensor | None = None  # int64 (size,): what :meth:`index` gives first instead, if set
        self._rank, self._pieces, self._size = 0, 1, batch_size
        self._piece, self._cursor = 0, 0
        self._drawn: list[Tensor] = []

    def share(self, rank: int, processes: int, pieces: int) -> None:
        """Split the batch over processes, and each process's part into ``pieces`` micro-batches.

        Raises ConfigError when the batch does not divide evenly.
        """
        if self.batch_size % (processes * pieces):
            raise ConfigError(
                f"config: loop.batch_size: expected a multiple of {processes} processes × loop.accumulate "
                f"{pieces}, got {self.batch_size}"
            )
        self._rank, self._pieces = rank, pieces
        self._size = self.batch_size // (processes * pieces)

    @property
    def size(self) -> int:
        """Rows of this piece."""
        return self._size

    def begin(self, piece: int = 0) -> None:
        """Start a piece; piece 0 starts a new step."""
        self._piece, self._cursor = piece, 0
        if piece == 0:
            self._drawn, self.chosen = [], None

    def index(self, count: int) -> Tensor:
        """int64 (size,): examples of ``count``, with replacement."""
        self.count = max(self.count, count)
        if self.only is not None and self.chosen is None:
            self.chosen = self.only
            return self.only
        whole = self._whole(lambda: torch.randint(count, (self.batch_size,), device=self.device))
        if self.chosen is None:
            self.chosen = whole
        return self._rows(whole)

    def integers(self, high: int) -> Tensor:
        """int64 (size,), uniform below ``high``."""
        return self._rows(self._whole(lambda: torch.randint(high, (self.batch_size,), device=self.device)))

    def uniform(self, *shape: int) -> Tensor:
        """float32 (size, *shape), uniform in [0, 1)."""
        return self._rows(self._whole(lambda: torch.rand(self.batch_size, *shape, device=self.device)))

    def normal(self, *shape: int) -> Tensor:
        """float32 (size, *shape), normal."""
        return self._rows(self._whole(lambda: torch.randn(self.batch_size, *shape, device=self.device)))

    def _whole(self, draw: Callable[[], Tensor]) -> Tensor:
        """The global batch's draw; later pieces of a step get the first one's."""
        if self._pieces == 1:
            return draw()
        if self._cursor == len(self._drawn):
            self._drawn.append(draw())
        self._cursor += 1
        return self._drawn[self._cursor - 1]

    def _rows(self, whole: Tensor) -> Tensor:
        start = (self._rank * self._pieces + self._piece) * self._size
        return whole[start : start + self._size]
