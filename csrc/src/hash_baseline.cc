#define LAYERWISE_HASH_VARIANT Xxh3Baseline
#include "hash_variant.inc"
