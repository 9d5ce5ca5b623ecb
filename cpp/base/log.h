// llama.cpp's log, kept until somebody fetches it, since its threads must not call into Python.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace overspill {

enum class LogLevel { debug, info, warning, error };

struct LogLine {
    LogLevel level;
    std::string text;  // without the newline
};

// Routes llama.cpp's log here, and its last words before an abort to `on_abort`, which is
// given the message and what was being done. Call once, before anything else.
void capture_log(void (*on_abort)(const char * message, const char * activity));

// Whether lines wait; cheap enough to ask after every step.
bool log_pending() noexcept;

// Takes the waiting lines. At most 4096 wait; later ones are counted, and the count is the last line.
std::vector<LogLine> drain_log();

// How many commands to RPC servers failed in this process, because a server was lost.
uint64_t n_rpc_failures() noexcept;

// Collects the errors that llama.cpp logs on this thread while it exists, to say why a call failed.
class ErrorCapture {
  public:
    ErrorCapture();
    ~ErrorCapture();
    ErrorCapture(const ErrorCapture &) = delete;
    ErrorCapture & operator=(const ErrorCapture &) = delete;

    // The cause in one line, without the name of upstream's function; `otherwise` if nothing was logged.
    std::string reason(const std::string & otherwise) const;

    // Throws OutOfMemoryError, whose text begins with `what`, if memory was refused.
    void throw_if_out_of_memory(const std::string & what) const;

    // For the log itself: hands an error to the innermost capture of this thread, if there is one.
    static void keep(const std::string & line);

  private:
    std::vector<std::string> lines_;
    ErrorCapture * outer_;
};

// Of the graph of one token that llama.cpp made last on this thread: how many parts it runs in, each
// on one device. It is in its log only.
int32_t logged_graph_splits() noexcept;

// Says what the process is doing, in case llama.cpp ends it. `activity` must outlive the process.
class Activity {
  public:
    explicit Activity(const char * activity) noexcept : before_(current.exchange(activity)) {}
    ~Activity() { current.store(before_); }
    Activity(const Activity &) = delete;
    Activity & operator=(const Activity &) = delete;

    static std::atomic<const char *> current;

  private:
    const char * before_;
};

}  // namespace overspill
