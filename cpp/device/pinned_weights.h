// Mapped weights that a GPU's driver gets to know: it copies them at the speed of pinned memory from then on, and
// nobody needs a second copy of them.
#pragma once

#include "base/process.h"

#include <ggml-backend.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace overspill {

struct PinnedMemory {
    uint64_t registered_bytes = 0;  // now
    uint64_t wanted_bytes = 0;      // in whole pages
    bool finished = true;           // whether no more will be registered
    std::string reason = {};        // why less is registered than was wanted; empty if nothing was refused
};

// The bytes of one tensor in memory that is mapped from a file.
struct MappedTensor {
    uintptr_t start;
    size_t n_bytes;
    const void * buffer;  // by which tensors of one file are known
};

// The piece of memory, in whole pages, that is registered at once.
struct PinnedPiece {
    uintptr_t start;
    size_t n_bytes;
};

// The pieces for these tensors: tensors of a file that share a page or lie close together are in one piece, since a
// copy must not be registered in part.
std::vector<PinnedPiece> pieces_of(std::vector<MappedTensor> tensors, size_t page_bytes);

// Whether the driver of the devices takes memory that others own.
bool registers_host_memory(ggml_backend_reg_t registration);

// Has the backends' drivers take such memory: llama.cpp's CUDA backend wants to see a variable in the environment.
void allow_registering_host_memory();

// Registers pieces one by one on a thread of its own, and undoes that. Knows no model: whoever frees the memory undoes
// it first.
class PinnedWeights {
  public:
    PinnedWeights() = default;
    ~PinnedWeights() { undo(); }
    PinnedWeights(const PinnedWeights &) = delete;
    PinnedWeights & operator=(const PinnedWeights &) = delete;

    // Starts; once only. Does not throw for what cannot be registered, but remembers why.
    void start(const std::vector<ggml_backend_dev_t> & devices, std::vector<MappedTensor> tensors);
    // Waits for the piece that is being registered, if any, and gives all of them up.
    void undo() noexcept;

    PinnedMemory state() const;

  private:
    void work() noexcept;

    void * register_ = nullptr;  // the driver's functions
    void * unregister_ = nullptr;
    std::vector<PinnedPiece> pieces_;
    std::thread thread_;

    const Origin origin_;
    mutable std::mutex mutex_;  // guards what follows; not held while the driver works
    bool stop_ = false;
    size_t n_registered_ = 0;  // pieces, from the first
    PinnedMemory state_;
};

}  // namespace overspill
