#include "../include/decode_matmul.cuh"

template struct hf_fuse::DecodeMatmulOf<__half>;
