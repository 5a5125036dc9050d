# SPDX-License-Identifier: Apache-2.0
"""Threads, processes and calls to the system: none ends unheard, outlives its owner, or is waited for without end."""
