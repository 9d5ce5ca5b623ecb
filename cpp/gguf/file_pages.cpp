#include "gguf/file_pages.h"

#ifdef __linux__
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#endif

namespace overspill {

#ifdef __linux__

namespace {

constexpr size_t piece_bytes = 32 << 20;  // a third of a second on a hard disk

// A file, mapped for as long as this lives; null where that is refused.
class Mapping {
  public:
    explicit Mapping(const std::string & path) {
        const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
        struct stat info{};
        if (file >= 0 && fstat(file, &info) == 0 && info.st_size > 0) {
            n_bytes_ = static_cast<size_t>(info.st_size);
            void * start = mmap(nullptr, n_bytes_, PROT_READ, MAP_SHARED, file, 0);
            start_ = start == MAP_FAILED ? nullptr : static_cast<std::byte *>(start);
        }
        if (file >= 0) {
            close(file);
        }
    }
    ~Mapping() {
        if (start_ != nullptr) {
            munmap(start_, n_bytes_);
        }
    }
    Mapping(const Mapping &) = delete;
    Mapping & operator=(const Mapping &) = delete;

    size_t n_bytes() const { return start_ == nullptr ? 0 : n_bytes_; }

    // Waits until the pages from `begin` on, a piece of them, have been read; the disk goes on with the next piece.
    // Returns whether the system can do that.
    bool read(size_t begin) const {
        constexpr int populate_read = 22;  // MADV_POPULATE_READ of Linux 5.14, which older headers lack
        const size_t next = begin + piece_bytes;
        if (next < n_bytes_) {
            madvise(start_ + next, std::min(piece_bytes, n_bytes_ - next), MADV_WILLNEED);
        }
        return madvise(start_ + begin, std::min(piece_bytes, n_bytes_ - begin), populate_read) == 0 || errno != EINVAL;
    }
    // The same for older systems. A file that somebody cuts off meanwhile would end the process here, as it would
    // later.
    void touch(size_t begin) const {
        const auto page_bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        const volatile std::byte * pages = start_;
        for (size_t at = begin; at < std::min(begin + piece_bytes, n_bytes_); at += page_bytes) {
            static_cast<void>(pages[at]);
        }
    }

  private:
    std::byte * start_ = nullptr;
    size_t n_bytes_ = 0;
};

}  // namespace

void read_into_page_cache(const std::vector<std::string> & files, const std::function<bool(float)> & report) {
    std::vector<std::unique_ptr<Mapping>> mappings;
    size_t n_bytes = 0;
    for (const std::string & file : files) {
        mappings.push_back(std::make_unique<Mapping>(file));
        n_bytes += mappings.back()->n_bytes();
    }
    size_t n_read = 0;
    for (const auto & mapping : mappings) {
        for (size_t begin = 0; begin < mapping->n_bytes(); begin += piece_bytes) {
            if (!report(static_cast<float>(n_read) / static_cast<float>(n_bytes))) {
                return;
            }
            if (!mapping->read(begin)) {
                mapping->touch(begin);
            }
            n_read += std::min(piece_bytes, mapping->n_bytes() - begin);
        }
    }
}

#else

void read_into_page_cache(const std::vector<std::string> & /*files*/, const std::function<bool(float)> & /*report*/) {}

#endif

}  // namespace overspill
