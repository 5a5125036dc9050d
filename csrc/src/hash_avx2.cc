#define LAYERWISE_HASH_VARIANT Xxh3Avx2
#define LAYERWISE_HASH_RUNS Xxh3RunsAvx2
#include "hash_variant.inc"
