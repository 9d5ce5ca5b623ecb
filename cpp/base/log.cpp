#include "base/log.h"

#include "base/error.h"
#include "device/rpc.h"

#include <ggml-backend.h>
#include <llama.h>

#include <cstdlib>
#include <mutex>

namespace overspill {

namespace {

constexpr size_t max_waiting_lines = 4096;

struct Queue {
    std::mutex mutex;
    std::vector<LogLine> lines;
    size_t n_dropped = 0;
    std::atomic<bool> pending{false};
};

Queue & queue() {
    // Never destroyed: llama.cpp's threads may log until the process is gone.
    static auto * instance = new Queue;
    return *instance;
}

std::atomic<uint64_t> rpc_failures{0};

// Each connection has a thread of its own, which fails every command after the first that failed: its first line of
// cmake/rpc_failures.h is kept, and no other.
bool repeats_rpc_failure(const LogLine & line) {
    thread_local bool lost = false;
    if (line.text != "an RPC server was lost") {
        return lost;
    }
    rpc_failures.fetch_add(1, std::memory_order_relaxed);
    return std::exchange(lost, true);
}

// A line may come in pieces, each call with the level "continued".
thread_local LogLine partial{LogLevel::info, {}};
thread_local ErrorCapture * capture = nullptr;
thread_local int32_t graph_splits = 0;

// As in "graph: nodes = 1047, splits = 2", or "splits = 51 / 49" for a batch and for one token.
void note_graph_splits(const std::string & line) {
    static const std::string mark = ", splits = ";
    const size_t at = line.find(mark);
    if (at == std::string::npos) {
        return;
    }
    const std::string numbers = line.substr(at + mark.size());
    const size_t comma = numbers.find(',');
    const size_t slash = numbers.find(" / ");
    graph_splits = static_cast<int32_t>(std::strtol(numbers.c_str() + (slash < comma ? slash + 3 : 0), nullptr, 10));
}

// The device whose memory has this name in llama.cpp's messages.
std::string device_of_buffer(const std::string & buffer) {
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t device = ggml_backend_dev_get(i);
        if (buffer == ggml_backend_buft_name(ggml_backend_dev_buffer_type(device))) {
            return ggml_backend_dev_name(device);
        }
    }
    return "CPU";  // pinned or repacked
}

void (*abort_hook)(const char *, const char *) = nullptr;

LogLevel level_of(ggml_log_level level) {
    switch (level) {
        case GGML_LOG_LEVEL_DEBUG: return LogLevel::debug;
        case GGML_LOG_LEVEL_WARN: return LogLevel::warning;
        case GGML_LOG_LEVEL_ERROR: return LogLevel::error;
        default: return LogLevel::info;
    }
}

void on_log(ggml_log_level level, const char * text, void * /*user_data*/) {
    // An exception must not reach upstream's C code; a line lost for want of memory is no loss.
    try {
        if (level != GGML_LOG_LEVEL_CONT) {
            partial = {level_of(level), {}};
        }
        partial.text += text;
        size_t end = 0;
        while ((end = partial.text.find('\n')) != std::string::npos) {
            LogLine line{partial.level, partial.text.substr(0, end)};
            partial.text.erase(0, end + 1);
            if (line.text.empty() || repeats_rpc_failure(line)) {
                continue;
            }
            if (line.level == LogLevel::error) {
                ErrorCapture::keep(line.text);
            }
            note_graph_splits(line.text);
            Queue & waiting = queue();
            const std::lock_guard lock(waiting.mutex);
            if (waiting.lines.size() < max_waiting_lines) {
                waiting.lines.push_back(std::move(line));
            } else {
                ++waiting.n_dropped;
            }
            waiting.pending.store(true, std::memory_order_release);
        }
    } catch (...) {
    }
}

void on_abort_message(const char * message) {
    if (abort_hook != nullptr) {
        abort_hook(message, Activity::current.load());
    }
}

}  // namespace

std::atomic<const char *> Activity::current{"nothing"};

void capture_log(void (*on_abort)(const char *, const char *)) {
    abort_hook = on_abort;
    llama_log_set(on_log, nullptr);
    ggml_set_abort_callback(on_abort_message);
}

bool log_pending() noexcept {
    return queue().pending.load(std::memory_order_acquire);
}

std::vector<LogLine> drain_log() {
    Queue & waiting = queue();
    const std::lock_guard lock(waiting.mutex);
    std::vector<LogLine> lines;
    lines.swap(waiting.lines);
    if (waiting.n_dropped > 0) {
        lines.push_back({LogLevel::warning, std::to_string(waiting.n_dropped) + " more lines were dropped"});
        waiting.n_dropped = 0;
    }
    waiting.pending.store(false, std::memory_order_release);
    return lines;
}

uint64_t n_rpc_failures() noexcept {
    return rpc_failures.load(std::memory_order_relaxed);
}

void ErrorCapture::keep(const std::string & line) {
    if (capture != nullptr) {
        capture->lines_.push_back(line);
    }
}

int32_t logged_graph_splits() noexcept {
    return graph_splits;
}

ErrorCapture::ErrorCapture() : outer_(std::exchange(capture, this)) {}

ErrorCapture::~ErrorCapture() {
    capture = outer_;
}

void ErrorCapture::throw_if_out_of_memory(const std::string & what) const {
    static const std::string mark = "failed to allocate ";
    static const std::string size_mark = " buffer of size ";
    for (const auto & line : lines_) {
        const size_t at = line.find(mark);
        const size_t size_at = line.find(size_mark);
        if (at == std::string::npos || size_at == std::string::npos || size_at < at) {
            continue;
        }
        const std::string buffer = line.substr(at + mark.size(), size_at - at - mark.size());
        const auto n_bytes = static_cast<size_t>(std::strtoull(line.c_str() + size_at + size_mark.size(), nullptr, 10));
        const std::string device = device_of_buffer(buffer);
        ggml_backend_dev_t found = ggml_backend_dev_by_name(device.c_str());
        const size_t free_bytes = found == nullptr ? 0 : device_memory(found).free_bytes;
        const auto mebibytes = [](size_t bytes) { return std::to_string(bytes >> 20U) + " MiB"; };
        throw OutOfMemoryError(what + device + " refused " + mebibytes(n_bytes) + ", of " + mebibytes(free_bytes) +
                                   " that it says are free now; put less on it (a smaller n_ctx, other offload)",
                               device, n_bytes);
    }
}

std::string ErrorCapture::reason(const std::string & otherwise) const {
    if (lines_.empty()) {
        return otherwise;
    }
    // Upstream reports the cause first and then every function that gave up because of it; a
    // line with this mark holds the text of the exception.
    static const std::string mark = "error loading model: ";
    for (const auto & line : lines_) {
        const size_t start = line.find(mark);
        if (start != std::string::npos && line.find("error loading model hyperparameters", start) != start) {
            return line.substr(start + mark.size());
        }
    }
    const std::string & line = lines_.front();
    const size_t colon = line.find(": ");
    const bool names_function = colon != std::string::npos && line.find(' ') > colon;
    return names_function ? line.substr(colon + 2) : line;
}

}  // namespace overspill
