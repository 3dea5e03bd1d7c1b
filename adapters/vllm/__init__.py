# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""vLLM's KV offloading with compressed records: see ``docs/guides/vllm.md``.

vLLM finds the connector by its name (`register` is a ``vllm.general_plugins`` entry point) or by the module path
``kvzip.adapters.vllm.connector``. Importing this package imports neither vLLM nor torch.
"""

from __future__ import annotations

CONNECTOR = "KvzipConnector"
CONNECTOR_MODULE = "kvzip.adapters.vllm.connector"
SPEC = "KvzipOffloadingSpec"
SPEC_MODULE = "kvzip.adapters.vllm.spec"


def register() -> None:
    """Make the connector and the spec known to vLLM by name; vLLM calls it in every process."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.v1.kv_offload.factory import OffloadingSpecFactory

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, CONNECTOR_MODULE, CONNECTOR)
    if SPEC not in OffloadingSpecFactory._registry:
        OffloadingSpecFactory.register_spec(SPEC, SPEC_MODULE, SPEC)
