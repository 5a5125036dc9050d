# SPDX-License-Identifier: Apache-2.0
"""The training loops of other packages, one module each, imported only when asked for: exact resume in one line."""
