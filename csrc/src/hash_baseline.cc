#define LAYERWISE_HASH_SUFFIX Baseline
#include "hash_variant.inc"
