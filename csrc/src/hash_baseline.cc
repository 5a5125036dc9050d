// SPDX-License-Identifier: Apache-2.0
#define LAYERWISE_HASH_SUFFIX Baseline
#include "hash_variant.inc"
