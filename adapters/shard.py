# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Which of a model's KV heads one worker has, and its part of a bound that is a table of all heads."""

from __future__ import annotations

from dataclasses import dataclass

from kvzip.errors import ConfigError
from kvzip.types import ErrorBound, SegmentLayout


@dataclass(frozen=True)
class Shard:
    """Which part of the model's KV heads a worker has.

    Attributes:
        rank: of the worker among those that share its layers.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def first_head(self, total: int, own: int) -> int:
        """The worker's first KV head among the model's.

        Args:
            total: KV heads of the model.
            own: KV heads of a worker; heads are replicated where there are more workers than heads.

        Raises:
            ConfigError: the numbers do not fit together.
        """
        if total == own * self.size:
            return self.rank * own
        if own == 1 and total <= self.size and self.size % total == 0:
            return self.rank // (self.size // total)
        if total == own:
            return 0
        raise ConfigError(
            f"the calibration table is for {total} KV heads, this model has {own} on each of {self.size} workers: "
            "use the table of this model"
        )

    def bound(
        self, bound: ErrorBound, segment: SegmentLayout, layer: int, heads: tuple[int, int], own: int
    ) -> ErrorBound:
        """The bound of one of the worker's pages.

        Args:
            bound: for all KV heads of the model.
            segment: the page.
            layer: number of its layer, for messages.
            heads: the worker's heads that the page holds, the first and the one behind the last.
            own: KV heads of the worker.

        Raises:
            ConfigError: the table is for another number of heads or channels.
        """
        if bound.channels is None:
            return bound
        table = bound.channels.values
        first = self.first_head(table.shape[0], own)
        part = table[first + heads[0] : first + heads[1]]
        if part.size != segment.heads * segment.head_dim:
            if segment.tokens == 1:  # in memory order, where channels are not known
                return ErrorBound.lossless()
            raise ConfigError(
                f"the calibration table is for {table.shape[1]} channels a head, layer {layer} has "
                f"{segment.heads * segment.head_dim // max(1, heads[1] - heads[0])}: use the table of this model"
            )
        return ErrorBound.channel_table(part.reshape(segment.heads, segment.head_dim))
