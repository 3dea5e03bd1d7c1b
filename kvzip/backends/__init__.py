# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Codecs: the contract, the registry, and the ones that kvzip brings."""
