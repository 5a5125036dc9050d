# SPDX-License-Identifier: Apache-2.0
"""Capture: making a layer's state safe to persist, by lease or by copy, and noticing when a lease was broken."""
