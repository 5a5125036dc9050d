# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are made outside a training loop: of what other tools have written, and for them."""
