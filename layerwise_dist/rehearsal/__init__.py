# SPDX-License-Identifier: Apache-2.0
"""`layerwise rehearse`: is a script exactly resumable? Its own command is run, killed, resumed, and compared."""
