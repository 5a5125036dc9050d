# SPDX-License-Identifier: Apache-2.0
"""Layers in the order in which their gradients arrive, and an optimizer that updates one of them at a time."""
