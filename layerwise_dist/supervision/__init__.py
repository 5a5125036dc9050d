# SPDX-License-Identifier: Apache-2.0
"""Threads, processes and system calls: none ends unnoticed, outlives its owner, or is awaited without end."""
