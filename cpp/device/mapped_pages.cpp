#include "device/mapped_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <utility>
#endif

namespace overspill {

#ifdef __linux__

namespace {

constexpr size_t step_bytes = 32 << 20;  // a third of a second on a hard disk
constexpr size_t ahead_bytes = 1 << 20;  // as much as the system begins to read at one request
constexpr int populate_read = 22;        // MADV_POPULATE_READ of Linux 5.14, which older headers lack

void * address(uintptr_t at) {
    return reinterpret_cast<void *>(at);  // NOLINT: where the file is mapped
}

// The disk begins to read these bytes, and nobody waits.
void begin_to_read(uintptr_t from, uintptr_t to) {
    for (uintptr_t at = from; at < to; at += ahead_bytes) {
        madvise(address(at), std::min<size_t>(ahead_bytes, to - at), MADV_WILLNEED);
    }
}

}  // namespace

void read_mapped(std::vector<MappedTensor> tensors, const std::function<bool(float)> & report) {
    const std::vector<PinnedPiece> pieces = pieces_of(std::move(tensors), static_cast<size_t>(sysconf(_SC_PAGESIZE)));
    size_t n_bytes = 0;
    for (const PinnedPiece & piece : pieces) {
        n_bytes += piece.n_bytes;
    }
    size_t n_read = 0;
    for (const PinnedPiece & piece : pieces) {
        const uintptr_t end = piece.start + piece.n_bytes;
        begin_to_read(piece.start, std::min(piece.start + step_bytes, end));
        for (uintptr_t at = piece.start; at < end; at += step_bytes) {
            if (!report(static_cast<float>(n_read) / static_cast<float>(n_bytes))) {
                return;
            }
            const size_t n = std::min<size_t>(step_bytes, end - at);
            begin_to_read(at + n, std::min(at + n + step_bytes, end));
            if (madvise(address(at), n, populate_read) != 0 && errno != EFAULT && errno != ENOMEM) {
                return;  // this system cannot: pages come when they are used
            }
            n_read += n;
        }
    }
}

#else

void read_mapped(std::vector<MappedTensor> /*tensors*/, const std::function<bool(float)> & /*report*/) {}

#endif

}  // namespace overspill
