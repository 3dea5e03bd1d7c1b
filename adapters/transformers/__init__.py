# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Models of Hugging Face transformers: query moments for bounds on keys, and what a coded cache does to a model.

`models` loads a model and reads its cache, `moments` measures its queries, `gradients` weighs the result, `schemes`
are ways to keep a cache, `fidelity` compares them. Needs ``pip install 'kvzip[calibrate]'``; nothing is imported before
it is used.
"""
