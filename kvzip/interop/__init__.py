# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Meeting points with other frameworks."""
