#include "device/pinned_weights.h"

#include "base/assertions.h"
#include "base/error_capture.h"
#include "base/log.h"
#include "base/thread_start.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <utility>

#ifdef _WIN32
#define NOMINMAX  // its macros
#include <windows.h>
#else
#include <sys/resource.h>
#include <unistd.h>
#endif

namespace overspill {

namespace {

// As ggml-cuda.h declares ggml_backend_cuda_register_host_buffer and its counterpart.
using Register = bool (*)(void *, size_t);
using Unregister = void (*)(void *);

constexpr const char * register_name = "ggml_backend_register_host_buffer";
constexpr const char * unregister_name = "ggml_backend_unregister_host_buffer";

size_t page_size() {
#ifdef _WIN32
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return info.dwPageSize;
#else
    return static_cast<size_t>(sysconf(_SC_PAGESIZE));
#endif
}

std::string mebibytes(uint64_t n_bytes) {
    return std::to_string(n_bytes >> 20U) + " MiB";
}

// What the system says about locking so much memory, to be appended to a reason; empty if it does not mind.
std::string limit_of([[maybe_unused]] uint64_t wanted_bytes) {
#ifdef _WIN32
    return {};
#else
    rlimit limit{};
    if (getrlimit(RLIMIT_MEMLOCK, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY || limit.rlim_cur >= wanted_bytes) {
        return "";
    }
    return "; the limit of locked memory (RLIMIT_MEMLOCK, ulimit -l) is " + mebibytes(limit.rlim_cur) + ", and " +
           mebibytes(wanted_bytes) + " were wanted";
#endif
}

}  // namespace

std::vector<PinnedPiece> pieces_of(std::vector<MappedTensor> tensors, size_t page_bytes) {
    // Registering a piece costs more than registering so many bytes along with it.
    constexpr uintptr_t close = uintptr_t{1} << 20;
    std::sort(tensors.begin(), tensors.end(), [](const auto & a, const auto & b) { return a.start < b.start; });
    std::vector<PinnedPiece> pieces;
    const void * buffer = nullptr;  // of the latest tensor
    for (const MappedTensor & tensor : tensors) {
        const uintptr_t start = tensor.start / page_bytes * page_bytes;
        const uintptr_t end = (tensor.start + tensor.n_bytes + page_bytes - 1) / page_bytes * page_bytes;
        const uintptr_t before = pieces.empty() ? 0 : pieces.back().start + pieces.back().n_bytes;
        // Between two files there may be nothing, or memory of somebody else.
        if (!pieces.empty() && (start < before || (tensor.buffer == buffer && start < before + close))) {
            pieces.back().n_bytes = std::max(before, end) - pieces.back().start;
        } else {
            pieces.push_back({start, end - start});
        }
        buffer = tensor.buffer;
    }
    return pieces;
}

bool registers_host_memory(ggml_backend_reg_t registration) {
    return ggml_backend_reg_get_proc_address(registration, register_name) != nullptr &&
           ggml_backend_reg_get_proc_address(registration, unregister_name) != nullptr;
}

void allow_registering_host_memory() {
    constexpr const char * variable = "GGML_CUDA_REGISTER_HOST";
#ifdef _WIN32
    if (std::getenv(variable) == nullptr) {
        _putenv_s(variable, "1");
    }
#else
    setenv(variable, "1", /*overwrite =*/0);
#endif
}

void PinnedWeights::start(const std::vector<ggml_backend_dev_t> & devices, std::vector<MappedTensor> tensors) {
    if (devices.empty()) {
        state_.reason = "no GPU holds a part of the model";
        return;
    }
    // One driver's registration is good for all of its devices.
    const auto found = std::find_if(devices.begin(), devices.end(), [](ggml_backend_dev_t device) {
        return registers_host_memory(ggml_backend_dev_backend_reg(device));
    });
    if (found == devices.end()) {
        state_.reason = "the driver of " + std::string(ggml_backend_dev_name(devices.front())) +
                        " does not register memory that others have allocated";
        return;
    }
    ggml_backend_reg_t registration = ggml_backend_dev_backend_reg(*found);
    register_ = ggml_backend_reg_get_proc_address(registration, register_name);
    unregister_ = ggml_backend_reg_get_proc_address(registration, unregister_name);
    pieces_ = pieces_of(std::move(tensors), page_size());
    for (const PinnedPiece & piece : pieces_) {
        state_.wanted_bytes += piece.n_bytes;
    }
    if (pieces_.empty()) {
        return;
    }
    state_.finished = false;
    try {
        thread_ = start_thread([this] { work(); });
    } catch (const std::exception & error) {
        state_.finished = true;
        state_.reason = std::string("no thread could be started: ") + error.what();
    }
}

void PinnedWeights::work() noexcept {
    std::string refused;
    try {
        const AssertionGuard guard;
        for (const PinnedPiece & piece : pieces_) {
            {
                const std::lock_guard lock(mutex_);
                if (stop_) {
                    break;
                }
            }
            const ErrorCapture errors(/*every_level =*/true);  // the driver's reason is a line for debugging
            if (!reinterpret_cast<Register>(register_)(reinterpret_cast<void *>(piece.start), piece.n_bytes)) {
                refused =
                    errors.reason("the driver refused " + mebibytes(piece.n_bytes)) + limit_of(state().wanted_bytes);
                break;
            }
            const std::lock_guard lock(mutex_);
            ++n_registered_;
            state_.registered_bytes += piece.n_bytes;
        }
        const PinnedMemory now = state();
        add_to_log(LogLevel::info, "registered " + mebibytes(now.registered_bytes) + " of " +
                                       mebibytes(now.wanted_bytes) + " of weights in RAM with the GPU's driver" +
                                       (refused.empty() ? "" : "; " + refused));
    } catch (const std::exception & error) {  // for want of memory: what is registered is known all the same
        refused.assign(error.what(), std::min<size_t>(std::strlen(error.what()), 15));  // needs no memory itself
    }
    const std::lock_guard lock(mutex_);
    state_.reason.swap(refused);
    state_.finished = true;
}

void PinnedWeights::undo() noexcept {
    {
        const std::lock_guard lock(mutex_);
        stop_ = true;
    }
    if (thread_.joinable()) {
        thread_.join();
    }
    const std::lock_guard lock(mutex_);
    while (n_registered_ > 0) {
        reinterpret_cast<Unregister>(unregister_)(reinterpret_cast<void *>(pieces_[--n_registered_].start));
    }
    state_.registered_bytes = 0;
}

PinnedMemory PinnedWeights::state() const {
    const auto lock = origin_.lock(mutex_);
    return state_;
}

}  // namespace overspill
