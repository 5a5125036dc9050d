# SPDX-License-Identifier: Apache-2.0
"""Training loops of other packages, one module each, imported only on request: exact resume in one line."""
