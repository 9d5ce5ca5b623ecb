// llama.cpp's log, kept until somebody fetches it, since its threads must not call into Python.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace overspill {

enum class LogLevel { debug, info, warning, error };

struct LogLine {
    LogLevel level;
    std::string text;  // without the newline
};

// Routes llama.cpp's log here. Call once, before anything else.
void capture_log();

// Held for each line; for whoever forks the process.
std::mutex & log_mutex() noexcept;

// Whether lines wait; cheap enough to ask after every step.
bool log_pending() noexcept;

// Puts a line of our own into it, from a thread that must not call into Python.
void add_to_log(LogLevel level, std::string text);

// Takes the waiting lines. At most 4096 wait; later ones are counted, and the count is the last line.
std::vector<LogLine> drain_log();

// How many commands to RPC servers failed in this process, because a server was lost.
uint64_t n_rpc_failures() noexcept;

// Of the graph of one token that llama.cpp made last on this thread: how many parts it runs in, each
// on one device. It is in its log only.
int32_t logged_graph_splits() noexcept;

}  // namespace overspill
