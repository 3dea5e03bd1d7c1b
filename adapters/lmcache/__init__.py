# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""LMCache's KV chunks as kvzip records in its storage tier (L2): see ``docs/guides/lmcache.md``.

`kvzip.adapters.lmcache.files` is what LMCache's ``--l2-adapter`` names; it registers the serde by itself. Importing
this package imports neither LMCache nor torch.
"""

from __future__ import annotations

#: Name of the serde in LMCache's settings.
SERDE = "kvzip"


def register() -> None:
    """Make the serde known to LMCache by its name, in this process; done before, it does nothing.

    Raises:
        ImportError: LMCache is not installed.
    """
    from lmcache.v1.distributed.serde import get_registered_serde_types, register_serde_factory

    from kvzip.adapters.lmcache.serde import create_processor

    if SERDE not in get_registered_serde_types():
        register_serde_factory(SERDE, create_processor)
