#define LAYERWISE_HASH_VARIANT Xxh3Avx512
#define LAYERWISE_HASH_RUNS Xxh3RunsAvx512
#include "hash_variant.inc"
