#include "base/log.h"

#include "base/error_capture.h"

#include <llama.h>

#include <atomic>
#include <cstdlib>
#include <utility>

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
            ErrorCapture::keep(line.text, line.level == LogLevel::error);
            note_graph_splits(line.text);
            add_to_log(line.level, std::move(line.text));
        }
    } catch (...) {
    }
}

}  // namespace

void capture_log() {
    llama_log_set(on_log, nullptr);
}

void add_to_log(LogLevel level, std::string text) {
    Queue & waiting = queue();
    const std::lock_guard lock(waiting.mutex);
    if (waiting.lines.size() < max_waiting_lines) {
        waiting.lines.push_back({level, std::move(text)});
    } else {
        ++waiting.n_dropped;
    }
    waiting.pending.store(true, std::memory_order_release);
}

std::mutex & log_mutex() noexcept {
    return queue().mutex;
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

int32_t logged_graph_splits() noexcept {
    return graph_splits;
}

}  // namespace overspill
