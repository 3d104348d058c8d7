// Kernels that are right, or wrong in the way that the first argument names: what finds the faults has to be tested
// too.
#include <cstdio>
#include <string_view>
#include <vector>

#include "neuroflow/device.cuh"

namespace neuroflow::cuda {
namespace {

enum Fault {
  none,
  missing_barrier,
  missing_thread,
  divergent_warp,
  unwritten_shared_memory,
  write_past_the_end,
  misaligned_vector,
  look_back_without_waiting,
  wait_for_a_later_block,
};

constexpr const char* names[] = {"none",
                                 "missing barrier",
                                 "missing thread",
                                 "divergent warp",
                                 "unwritten shared memory",
                                 "write past the end",
                                 "misaligned vector",
                                 "look-back without waiting",
                                 "wait for a later block"};

constexpr int threads = 128, blocks = 40;

/// Every block's part of x, reversed.
__global__ void reverse(const float* x, float* reversed, Fault fault) {
  __shared__ float part[threads];
  __shared__ float nothing;
  if (fault == missing_thread && threadIdx.x == 3) return;
  if (fault != unwritten_shared_memory || threadIdx.x != 5) part[threadIdx.x] = x[blockIdx.x * threads + threadIdx.x];
  if (fault == divergent_warp && threadIdx.x == 70) __syncwarp();
  if (fault != missing_barrier) __syncthreads();
  const int moved = fault == write_past_the_end ? 1 : 0;
  reversed[blockIdx.x * threads + threadIdx.x + moved] = part[threads - 1 - threadIdx.x];
  if (fault == misaligned_vector && threadIdx.x == 0) store(reversed, load(x + 1));
}

/// How many blocks began before each, from what these tell each other.
__global__ void count_earlier(int* begun, uint64_t* progress, int* earlier, Fault fault) {
  __shared__ int block;
  if (threadIdx.x == 0) block = add_relaxed(begun, 1);
  __syncthreads();
  const int next = (block + 1) % blocks;
  if (fault == wait_for_a_later_block) look_back(progress, next + 1);
  if (fault == look_back_without_waiting && block > 0) {
    const int seen = static_cast<uint32_t>(load_acquire(progress + block - 1));
    publish(progress + block, inclusive_sum, seen + 1);
    earlier[block] = seen;
    return;
  }
  if (threadIdx.x == 0) publish(progress + block, own_sum, 1);
  const int sum = look_back(progress, block);
  if (threadIdx.x == 0) publish(progress + block, inclusive_sum, sum + 1);
  earlier[block] = sum;
}

bool are_right(Fault fault) {
  std::vector<float> x(threads * blocks), reversed(threads * blocks);
  for (int i = 0; i < threads * blocks; ++i) x[i] = i;
  launch(reverse, blocks, threads, 0, nullptr, x.data(), reversed.data(), fault);
  std::vector<int> earlier(blocks);
  std::vector<uint64_t> progress(blocks);
  int begun = 0;
  launch(count_earlier, blocks, warp_size, 0, nullptr, &begun, progress.data(), earlier.data(), fault);
  for (int i = 0; i < threads * blocks; ++i)
    if (reversed[i] != x[i / threads * threads + threads - 1 - i % threads]) return false;
  for (int block = 0; block < blocks; ++block)
    if (earlier[block] != block) return false;
  return true;
}

}  // namespace
}  // namespace neuroflow::cuda

int main(int, char** arguments) {
  using namespace neuroflow::cuda;
  for (int fault = none; fault <= wait_for_a_later_block; ++fault) {
    if (std::string_view(arguments[1]) != names[fault]) continue;
    try {
      std::puts(are_right(static_cast<Fault>(fault)) ? "right" : "wrong");
    } catch (const std::exception& error) {
      std::puts(error.what());
    }
    return 0;
  }
  return 1;
}
