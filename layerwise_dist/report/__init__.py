# SPDX-License-Identifier: Apache-2.0
"""Makes one HTML page about a run: its facts, its charts, and the page around them."""
