// Runs a grid of CUDA blocks on the host, the same way in every run.
//
// Several blocks are resident at a time, taken in random order, each on a thread of its own. Only one of these threads
// runs; it hands over to another, drawn at random, where blocks can see each other's work. Within a block the threads
// are fibers, of which any that can run is drawn wherever one has to wait: whoever relied on an order, or left out a
// barrier, gets it wrong soon. Shared memory holds nonsense when a block begins. What can never end is an error.
#include <link.h>
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cuda_runtime.h"

namespace cuda_on_host {
namespace {

constexpr unsigned resident_blocks = 4;
constexpr size_t stack_bytes = 64 << 10;
constexpr int patience = 200000;  // looks at other blocks' work, by all blocks, while nobody does any

std::string last_error;
std::vector<std::unique_ptr<char[]>> stacks;  // that no thread uses

/// A grid's blocks, of which one runs at a time.
struct Grid {
  const cudaLaunchConfig_t& config;
  const std::function<void()>& kernel;
  std::minstd_rand random;
  std::vector<unsigned> order{};  // of the blocks that have not begun, from the back
  std::vector<int> residents{};   // threads with a block, of which `running` is one
  int running = 0;
  int idle = 0;
  std::string error{};
  std::mutex mutex{};
  std::condition_variable turn[resident_blocks]{};  // of each thread

  unsigned draw(unsigned below) { return random() % below; }

  void wait(std::unique_lock<std::mutex>& lock, int thread) {
    turn[thread].wait(lock, [&] { return running == thread; });
  }

  void hand_over(int thread) {
    if (residents.size() == 1) return;
    std::unique_lock lock(mutex);
    running = residents[draw(residents.size())];
    if (running == thread) return;
    turn[running].notify_one();
    wait(lock, thread);
  }

  void leave(int thread) {
    std::unique_lock lock(mutex);
    std::erase(residents, thread);
    if (residents.empty()) return;
    running = residents[draw(residents.size())];
    turn[running].notify_one();
  }
};

struct Fiber {
  unsigned thread;
  void* stack_bottom;
  size_t stack_size;
  ucontext_t context;
  void* fake_stack = nullptr;
  const char* waits_at = nullptr;
  bool finished = false;
};

/// Threads that wait for each other, and the intrinsic that the first of them called.
struct Meeting {
  const char* intrinsic;
  int arrived = 0;
};

struct Warp {
  Meeting meeting;
  uint64_t brought[2][warpSize];  // by turns, as a lane may read the last while others bring the next
  int turn = 0;
};

struct Block {
  Grid& grid;
  int host_thread;
  std::vector<Fiber> fibers;
  std::vector<Fiber*> ready;
  std::vector<Warp> warps;
  Meeting meeting{};
  size_t choice = 0;  // how many of those that became ready last one is drawn from
  Fiber host{};
  Fiber* current = &host;

  void switch_to(Fiber& next) {
    Fiber& previous = *current;
    current = &next;
    if (&next != &host) threadIdx = {next.thread, 0, 0};
    if (&next == &previous) return;
    __sanitizer_start_switch_fiber(previous.finished ? nullptr : &previous.fake_stack, next.stack_bottom,
                                   next.stack_size);
    swapcontext(&previous.context, &next.context);
    __sanitizer_finish_switch_fiber(previous.fake_stack, nullptr, nullptr);
  }

  /// Runs any thread that can run, or the host, where there is none.
  void run_any() {
    if (ready.empty() || !grid.error.empty()) return switch_to(host);
    std::swap(ready[ready.size() - 1 - grid.draw(std::min(choice, ready.size()))], ready.back());
    Fiber& next = *ready.back();
    ready.pop_back();
    switch_to(next);
  }

  [[noreturn]] void fail(const std::string& error) {
    if (grid.error.empty()) grid.error = "block " + std::to_string(blockIdx.x) + ": " + error;
    switch_to(host);
    __builtin_unreachable();
  }

  /// Whether the running thread is the last of `threads`, from `first` on, to arrive; the others have waited till then.
  bool is_last(Meeting& meeting, const char* intrinsic, Fiber* first, int threads) {
    if (meeting.arrived++ == 0) meeting.intrinsic = intrinsic;
    if (std::strcmp(meeting.intrinsic, intrinsic) != 0)
      fail("thread " + std::to_string(current->thread) + " is at " + intrinsic + ", another at " + meeting.intrinsic);
    if (meeting.arrived < threads) {
      current->waits_at = intrinsic;
      run_any();
      return false;
    }
    meeting.arrived = 0;
    for (Fiber* fiber = first; fiber < first + threads; ++fiber) {
      if (fiber == current) continue;
      fiber->waits_at = nullptr;
      ready.push_back(fiber);
    }
    return true;
  }
};

constinit thread_local Block* block = nullptr;

void run_thread() {
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  block->grid.kernel();
  block->current->finished = true;
  block->grid.idle = 0;
  block->run_any();
}

void make_fiber(Fiber& fiber, unsigned thread) {
  if (stacks.empty()) stacks.push_back(std::make_unique_for_overwrite<char[]>(stack_bytes));
  fiber.thread = thread;
  fiber.stack_bottom = stacks.back().release();
  fiber.stack_size = stack_bytes;
  stacks.pop_back();
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack_bottom;
  fiber.context.uc_stack.ss_size = stack_bytes;
  makecontext(&fiber.context, run_thread, 0);
  fiber.context.uc_stack = {};  // ASan would take it for one to forget all about at every switch
}

/// Fills this thread's copies of this library's thread_local variables, which shared memory is.
void poison_shared_memory() {
  threadIdx = {};  // the copies exist from the first use
  dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void*) {
        const auto* tls = static_cast<const char*>(library->dlpi_tls_data);
        const auto* variable = reinterpret_cast<const char*>(&threadIdx);
        for (int i = 0; i < library->dlpi_phnum; ++i) {
          const auto& segment = library->dlpi_phdr[i];
          if (segment.p_type != PT_TLS || tls == nullptr || variable < tls || variable >= tls + segment.p_memsz)
            continue;
          std::memset(library->dlpi_tls_data, 0xfb, segment.p_memsz);
          return 1;
        }
        return 0;
      },
      nullptr);
}

std::string stuck(const Block& block) {
  const auto unfinished = [](const Fiber& fiber) { return !fiber.finished; };
  const Fiber& waiting = *std::find_if(block.fibers.begin(), block.fibers.end(), unfinished);
  const auto other = std::find_if(block.fibers.begin(), block.fibers.end(), [&](const Fiber& fiber) {
    return fiber.finished || std::strcmp(fiber.waits_at, waiting.waits_at) != 0;
  });
  return "thread " + std::to_string(waiting.thread) + " waits at " + waiting.waits_at + " for ever, thread " +
         std::to_string(other->thread) + (other->finished ? " has returned" : std::string(" at ") + other->waits_at);
}

void run_block(Grid& grid, int host_thread, unsigned number) {
  const dim3 size = grid.config.blockDim, blocks = grid.config.gridDim;
  Block running{grid, host_thread, std::vector<Fiber>(size.x), {}, std::vector<Warp>(size.x / warpSize)};
  running.choice = grid.draw(2) == 0 ? size.x : 4;  // of few, a warp runs far ahead of others
  poison_shared_memory();
  block = &running;
  blockDim = {size.x, 1, 1};
  gridDim = {blocks.x, blocks.y, blocks.z};
  blockIdx = {number % blocks.x, number / blocks.x % blocks.y, number / blocks.x / blocks.y};

  pthread_attr_t attributes;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &running.host.stack_bottom, &running.host.stack_size);
  pthread_attr_destroy(&attributes);

  for (unsigned thread = 0; thread < size.x; ++thread) {
    make_fiber(running.fibers[thread], thread);
    running.ready.push_back(&running.fibers[thread]);
  }
  running.run_any();
  const bool finished = std::ranges::all_of(running.fibers, &Fiber::finished);
  if (!finished && grid.error.empty()) grid.error = "block " + std::to_string(number) + ": " + stuck(running);
  for (Fiber& fiber : running.fibers) {
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack_bottom, stack_bytes);  // of calls that never returned
    stacks.emplace_back(static_cast<char*>(fiber.stack_bottom));
  }
}

void run_blocks(Grid& grid, int thread) {
  {
    std::unique_lock lock(grid.mutex);
    grid.wait(lock, thread);
  }
  while (!grid.order.empty() && grid.error.empty()) {
    const unsigned number = grid.order.back();
    grid.order.pop_back();
    run_block(grid, thread, number);
    grid.hand_over(thread);
  }
  grid.leave(thread);
}

}  // namespace

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  static std::minstd_rand random(1);
  const dim3 size = config.blockDim, blocks = config.gridDim;
  last_error = size.x == 0 || size.x > 1024 || size.x % warpSize != 0 || size.y != 1 || size.z != 1
                   ? "a block of " + std::to_string(size.x) + " threads; accepted is a row of 1 to 32 warps"
               : config.dynamicSmemBytes != 0 ? "shared memory of a size set by the launch is not supported"
               : blocks.x == 0 || blocks.y == 0 || blocks.z == 0 ? "a grid without blocks"
                                                                 : "";
  if (!last_error.empty()) return cudaErrorLaunchFailure;

  Grid grid{config, kernel, std::minstd_rand(random())};
  grid.order.resize(size_t{blocks.x} * blocks.y * blocks.z);
  std::iota(grid.order.begin(), grid.order.end(), 0);
  std::shuffle(grid.order.begin(), grid.order.end(), grid.random);
  grid.residents.resize(std::min<size_t>(resident_blocks, grid.order.size()));
  std::iota(grid.residents.begin(), grid.residents.end(), 0);
  std::vector<std::thread> threads;
  const int resident = grid.residents.size();
  for (int thread = 0; thread < resident; ++thread) threads.emplace_back([&grid, thread] { run_blocks(grid, thread); });
  for (std::thread& thread : threads) thread.join();
  last_error = grid.error;
  return last_error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

void meet_block(const char* intrinsic) {
  block->is_last(block->meeting, intrinsic, block->fibers.data(), block->fibers.size());
}

const uint64_t* meet_warp(const char* intrinsic, unsigned mask, uint64_t value) {
  Block& here = *block;
  const unsigned lane = threadIdx.x % warpSize;
  Warp& warp = here.warps[threadIdx.x / warpSize];
  if (mask != ~0u) here.fail(std::string(intrinsic) + " of some lanes only is not supported");
  const uint64_t* brought = warp.brought[warp.turn];
  warp.brought[warp.turn][lane] = value;
  if (here.is_last(warp.meeting, intrinsic, &here.fibers[threadIdx.x - lane], warpSize)) warp.turn ^= 1;
  return brought;
}

void meet_grid(bool waits) {
  Block& here = *block;
  Grid& grid = here.grid;
  if (!waits) grid.idle = 0;
  if (++grid.idle > patience) here.fail("all blocks wait for each other");
  if (grid.draw(waits ? 32 : 4) == 0) grid.hand_over(here.host_thread);  // seldom, as that takes the longest
  here.ready.push_back(here.current);
  std::swap(here.ready[grid.draw(here.ready.size())], here.ready.back());
  here.run_any();
}

}  // namespace cuda_on_host

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : cuda_on_host::last_error.c_str();
}

// What torch has of CUDA, for tensors on the CPU.
extern "C" {
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}

int32_t aoti_torch_delete_device_guard(void*) { return 0; }
}
