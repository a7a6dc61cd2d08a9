// decode_linear by dtype.
#include "../include/decode_rows.cuh"

namespace hf_fuse {

void decode_linear(const DecodeLinear& p, void* stream) {
  constexpr int64_t kMaxUnits = 1 << 30;  // so that int counts rows and adds them up
  int64_t units = p.weights[0].rows;
  if (p.epilogue != Epilogue::kGated) units += p.weights[1].rows + p.weights[2].rows;
  if (units >= kMaxUnits) {
    throw std::runtime_error("hf_fuse.decode_linear: too many rows: " + std::to_string(units));
  }
  dispatch_dtype(kDecodeLinear, p.dtype, [&](auto tag) {
    DecodeLinearOf<typename decltype(tag)::type>::run(p, units, stream);
  });
}

void decode_linear_two(const DecodeLinear& a, const DecodeLinear& b, void* stream) {
  bool done = false;
  dispatch_dtype(kDecodeLinear, a.dtype, [&](auto tag) {
    done = DecodeLinearOf<typename decltype(tag)::type>::run_two(a, b, stream);
  });
  if (!done) decode_linear(a, stream), decode_linear(b, stream);
}

}  // namespace hf_fuse
