// decode_embed on CPU: one row of the table a sequence, and one of the positions, widened to fp32.
#include "cpu.h"
#include "decode.h"

namespace hf_fuse {
namespace {

void check_index(const char* name, int64_t index, int64_t size) {
  if (index < 0 || index >= size)
    throw std::runtime_error(std::string("hf_fuse decode_embed: ") + name + " " +
                             std::to_string(index) + " is not one of " + std::to_string(size));
}

template <typename T>
void embed(const DecodeEmbed& p, int64_t sequence) {
  float* residual = p.residual + sequence * p.size;
  const int64_t token = p.token[sequence];
  check_index("token", token, p.vocab);
  load_row(at<T>(p.table, token * p.size), residual, p.size);
  for (int64_t i = 0; i < p.size; ++i) residual[i] *= p.scale;
  if (!p.positions) return;
  const int64_t position = *p.length - p.start[sequence];
  check_index("position", position, p.num_positions);
  const T* row = at<T>(p.positions, position * p.size);
  for (int64_t i = 0; i < p.size; ++i) residual[i] += to_acc(row[i]);
}

}  // namespace

void decode_embed(const DecodeEmbed& p, void*) {
  dispatch_decode("decode_embed", p.dtype, [&](auto type) {
    for (int64_t sequence = 0; sequence < p.batch; ++sequence) embed<decltype(type)>(p, sequence);
  });
}

}  // namespace hf_fuse
