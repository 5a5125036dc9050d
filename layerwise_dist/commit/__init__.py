# SPDX-License-Identifier: Apache-2.0
"""Commit: who may write here, what a manifest says, and the rank-0 coordinator that decides."""
