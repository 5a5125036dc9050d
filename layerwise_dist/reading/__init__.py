# SPDX-License-Identifier: Apache-2.0
"""Checkpoints without the job that wrote them: opened to read, and loaded into models without an engine."""
