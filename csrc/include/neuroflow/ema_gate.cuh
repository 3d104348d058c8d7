#pragma once

#include <algorithm>

#include "neuroflow/ema_surprise.cuh"
#include "neuroflow/rows.cuh"
#include "neuroflow/select.cuh"

namespace neuroflow::cuda {

/// The streams' tokens, cut into tiles; a block takes one tile.
struct Tiles {
  static constexpr int most_rows = warp_size;  // because one warp decides on a tile

  int64_t streams;
  int tokens;
  int rows;        // of a tile; the last of a stream may have fewer
  int per_stream;  // tiles

  int64_t count() const { return streams * per_stream; }
  int64_t words() const { return 1 + 2 * streams + count(); }  // of progress
};

/// Words through which the blocks of one launch communicate; all are 0 before it.
struct GateProgress {
  uint64_t* begun;    // blocks
  uint64_t* streams;  // [streams] active tokens
  uint64_t* written;  // [streams] tiles written to memory, while fewer tokens are active than the floor
  uint64_t* tiles;    // [streams, tiles per stream] active tokens
};

/// Copies rows of h, or zeros where `row` gives -1, to packed[first] up to packed[end] and not past `rows`.
template <typename Word, typename Row>
__device__ inline void write_packed(const Word* h, Word* packed, int64_t words, int64_t first, int64_t end,
                                    int64_t rows, Row&& row) {
  for (int64_t slot = first + threadIdx.x / warp_size; slot < std::min(end, rows); slot += blockDim.x / warp_size) {
    const int64_t from = row(slot);
    Word* target = packed + slot * words;
    if (from < 0)
      write_row(target, words, [](int64_t) { return Word{}; });
    else
      write_row(target, words, [&](int64_t i) { return h[from * words + i]; });
  }
}

/// Surprise, new references, index, cu_seqlens and packed rows in one launch.
template <typename Token, typename Reference, int vectors>
__global__ void __launch_bounds__(RowShape::threads, vectors < most_vectors ? 6 : 5)
    ema_gate_kernel(const Token* h, Reference* ema, RowShape shape, Accumulator<Token> keep, Accumulator<Token> take,
                    bool move, const float* threshold, int floor, Tiles tiles, GateProgress progress, float* surprise,
                    int32_t* index, int32_t* cu_seqlens, Token* packed, int64_t rows) {
  __shared__ SelectScratch scratch;
  __shared__ float tile_surprise[Tiles::most_rows];
  __shared__ int tile_rows[Tiles::most_rows];  // of the tile's active tokens
  __shared__ int begun, active, before, total, stream_base;

  if (threadIdx.x == 0) begun = static_cast<int>(add_relaxed(progress.begun, uint64_t{1}));
  __syncthreads();
  const int block = begun, stream = block / tiles.per_stream, tile = block % tiles.per_stream;
  const int first = tile * tiles.rows;
  const int inside = std::min(tiles.rows, tiles.tokens - first);
  const bool last = tile == tiles.per_stream - 1;
  const int64_t stream_row = int64_t{stream} * tiles.tokens, first_row = stream_row + first;
  for (int start = 0; start < inside; start += shape.rows_per_block()) {
    const int in_tile = start + threadIdx.x / shape.row_threads();
    const int64_t row = first_row + in_tile;
    const float value = ema_surprise<Token, Reference, vectors>(h + row * shape.dim, ema + row * shape.dim,
                                                                in_tile < inside, shape, keep, take, move);
    if (in_tile < inside && threadIdx.x % shape.row_threads() == 0) tile_surprise[in_tile] = surprise[row] = value;
  }
  __syncthreads();

  if (threadIdx.x < warp_size) {
    const int lane = threadIdx.x;
    const uint32_t cutoff = threshold[stream] <= 0 ? Cutoff::all : ordered_key(threshold[stream]);
    const bool chosen = lane < inside && ordered_key(tile_surprise[lane]) > cutoff;
    const unsigned choices = __ballot_sync(all_lanes, chosen);
    if (chosen) tile_rows[__popc(choices & ((1u << lane) - 1))] = first_row + lane;
    const int own = __popc(choices);
    uint64_t* in_stream = progress.tiles + int64_t{stream} * tiles.per_stream;
    if (lane == 0) publish(in_stream + tile, own_sum, own);
    const int earlier = look_back(in_stream, tile);
    if (lane == 0) publish(in_stream + tile, inclusive_sum, earlier + own);
    const int of_stream = std::max(earlier + own, floor);  // if this is its last tile
    if (last && lane == 0) publish(progress.streams + stream, own_sum, of_stream);
    const int base = look_back(progress.streams, stream);
    if (last && lane == 0) publish(progress.streams + stream, inclusive_sum, base + of_stream);
    if (lane == 0) {
      active = own;
      before = earlier;
      total = of_stream;
      stream_base = base;
    }
  }
  __syncthreads();

  using Word = std::conditional_t<vectors == 0, Token, uint4>;
  const int64_t words = shape.dim * static_cast<int64_t>(sizeof(Token)) / static_cast<int64_t>(sizeof(Word));
  const Word* source = reinterpret_cast<const Word*>(h);
  Word* target = reinterpret_cast<Word*>(packed);
  const int base = stream_base;
  if (last && total > before + active) {
    // Too few are above the threshold. The floor's tokens replace what earlier tiles wrote.
    if (threadIdx.x == 0)
      while (load_acquire(progress.written + stream) + 1 < static_cast<uint64_t>(tiles.per_stream)) __nanosleep(100);
    __syncthreads();
    const float* values = surprise + stream_row;
    const Cutoff cutoff = select_most(values, tiles.tokens, total, scratch);
    count_active(values, tiles.tokens, cutoff.key, scratch);
    write_active(values, tiles.tokens, cutoff, stream_row, index + base, scratch);
    __syncthreads();
    write_packed(source, target, words, base, base + total, rows, [&](int64_t slot) { return index[slot]; });
  } else {
    const int64_t slot = int64_t{base} + before;
    if (static_cast<int>(threadIdx.x) < active) index[slot + threadIdx.x] = tile_rows[threadIdx.x];
    write_packed(source, target, words, slot, slot + active, rows, [&](int64_t at) { return tile_rows[at - slot]; });
  }

  // Inactive tokens before this tile have taken their slots from the end; this stream and those before have up to
  // `most`.
  const int64_t slots = tiles.streams * tiles.tokens, earlier = stream_row - base;
  const int64_t most = earlier + tiles.tokens - floor;
  const int64_t passed = std::min(earlier + first - before, most);
  const int64_t passed_with_this = std::min(earlier + first - before + inside - active, most);
  const auto zeros = [](int64_t) { return -1; };
  write_unused(passed, passed_with_this, slots, index);
  write_packed(source, target, words, slots - passed_with_this, slots - passed, rows, zeros);
  const int64_t share = ceil_div<int64_t>(std::max<int64_t>(rows - slots, 0), gridDim.x);
  write_packed(source, target, words, slots + block * share, slots + (block + 1) * share, rows, zeros);

  if (last && threadIdx.x == 0) {
    if (stream == 0) cu_seqlens[0] = 0;
    cu_seqlens[stream + 1] = base + total;
  }
  if (last || before + active >= floor) return;  // no block waits for this one
  __syncthreads();
  if (threadIdx.x == 0) add_release(progress.written + stream, uint64_t{1});
}

/// Few and large tiles, which wait for each other less often, but enough of them for every multiprocessor.
template <typename Token>
Tiles gate_tiles(int64_t streams, int64_t tokens, int64_t dim) {
  const int together = row_shape<Token>(dim).rows_per_block();
  const int rows = together * static_cast<int>(std::clamp<int64_t>(streams * tokens / (512 * together), 1, 4));
  return {streams, static_cast<int>(tokens), rows, ceil_div(static_cast<int>(tokens), rows)};
}

/// h, ema: [streams, tokens, dim]; threshold: [streams]; surprise: [streams, tokens]; index: [streams * tokens];
/// cu_seqlens: [streams + 1]; packed: [rows, dim]; words: tiles.words() of them, set to 0 here. They are not kept
/// between calls, because then they could not serve two CUDA streams at once.
template <typename Token, typename Reference>
void launch_ema_gate(const Token* h, Reference* ema, double decay, const float* threshold, int64_t floor,
                     const Tiles& tiles, int64_t dim, uint64_t* words, float* surprise, int32_t* index,
                     int32_t* cu_seqlens, Token* packed, int64_t rows, cudaStream_t stream) {
  check(cudaMemsetAsync(words, 0, tiles.words() * sizeof(uint64_t), stream));
  const RowShape shape = row_shape<Token>(dim);
  uint64_t* written = words + 1 + tiles.streams;
  const GateProgress progress{words, words + 1, written, written + tiles.streams};
  dispatch_vectors(h, ema, shape, [&](auto vectors) {
    launch(ema_gate_kernel<Token, Reference, vectors>, static_cast<unsigned>(tiles.count()), RowShape::threads, 0,
           stream, h, ema, shape, 1.0 - decay, decay, decay != 0, threshold, std::min<int64_t>(floor, tiles.tokens),
           tiles, progress, surprise, index, cu_seqlens, packed, rows);
  });
}

}  // namespace neuroflow::cuda
