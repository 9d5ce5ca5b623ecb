#include "log.h"

#include <llama.h>

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

// A line may come in pieces, each call with the level "continued".
thread_local LogLine partial{LogLevel::info, {}};
thread_local ErrorCapture * capture = nullptr;

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
            if (line.text.empty()) {
                continue;
            }
            if (line.level == LogLevel::error) {
                ErrorCapture::keep(line.text);
            }
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

void ErrorCapture::keep(const std::string & line) {
    if (capture != nullptr) {
        capture->lines_.push_back(line);
    }
}

ErrorCapture::ErrorCapture() : outer_(std::exchange(capture, this)) {}

ErrorCapture::~ErrorCapture() {
    capture = outer_;
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
