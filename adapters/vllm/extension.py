# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""`KvzipWorkerExtension`: settings and counters of running workers, through vLLM's ``collective_rpc``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kvzip.errors import ConfigError


class KvzipWorkerExtension:
    """What vLLM adds to its workers when ``worker_extension_cls`` names this class.

    ``llm.collective_rpc("kvzip_configure", kwargs={"bound": "rel:1e-2"})`` changes what all workers store from then on.
    """

    def kvzip_configure(self, **changes: Any) -> dict[str, str]:
        """Change settings of this worker.

        Args:
            changes: ``codec``, ``bound``, ``layer_bounds`` or ``mode``, as in ``kv_connector_extra_config``.

        Returns:
            The settings that hold now, as text.

        Raises:
            ConfigError: one is not known or out of range; nothing was changed.
        """
        settings = _connector().worker.configure(**changes)
        return {name: str(getattr(settings, name)) for name in ("codec", "bounds", "mode")}

    def kvzip_stats(self) -> dict[str, Any]:
        """Counters of this worker's engine and pool, by the names of `kvzip.engine.EngineStats`."""
        return asdict(_connector().worker.engine.stats())


def _connector() -> Any:
    """This worker's `KvzipConnector`, also inside vLLM's ``MultiConnector``."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from kvzip.adapters.vllm.connector import KvzipConnector

    group = get_kv_transfer_group()
    for connector in (group, *getattr(group, "_connectors", ())):
        if isinstance(connector, KvzipConnector):
            return connector
    raise ConfigError(f'this vLLM uses {type(group).__name__}: set "kv_connector": "KvzipConnector"')
