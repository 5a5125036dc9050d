# SPDX-License-Identifier: Apache-2.0
"""Checkpoints made outside a training loop: imported from other tools, or for them."""
