# SPDX-License-Identifier: Apache-2.0
"""The kit for a machine with a GPU: `bash tests/gpu.sh`. A section is a function that takes a `Kit`, returns a remark,
raises `Skip` with the reason where it can't be tried, and fails by any other exception.
"""
