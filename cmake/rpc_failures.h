// Included by force before ggml-rpc.cpp of llama.cpp, which ends the process when a server is lost.
//
// Here a command that is lost is answered with zeros, so that whoever waits for it goes on, and one line of the
// log says so: cpp/base/log.cpp counts these lines, and cpp/device/rpc.cpp looks for the server. A failure to connect,
// which happens on the caller's own thread, is an exception. Who waits for an answer asks whether to go on. Everything
// else ends the process as before.
#pragma once

#include "ggml-impl.h"
// These come first, so that their own assertions stay as they are.
#include "ggml-backend-impl.h"
#include "ggml-cpp.h"

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <type_traits>

// Where a thread works on a command, a local variable of this name holds it.
static constexpr std::nullptr_t msg_ptr = nullptr;

template <typename Message>
void overspill_answer_lost_command(Message & message) {
    using Command = decltype(message.cmd);
    if (message.output == nullptr) {
        return;
    }
    std::memset(message.output, 0, message.output_size);
    // Zeros would fail an assertion elsewhere, or stay for good: upstream asks for the first two once per process.
    uint64_t answer = 0;
    if (message.cmd == Command::RPC_CMD_GET_ALIGNMENT || message.cmd == Command::RPC_CMD_BUFFER_GET_BASE) {
        answer = 4096;
    } else if (message.cmd == Command::RPC_CMD_GET_MAX_SIZE) {
        answer = SIZE_MAX;
    } else {
        return;
    }
    std::memcpy(message.output, &answer, message.output_size < sizeof(answer) ? message.output_size : sizeof(answer));
}

template <typename MessagePointer>
void overspill_rpc_failure(const MessagePointer & message, const char * file, int line, const char * format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    const auto is = [text](const char * beginning) {
        return std::strncmp(text, beginning, std::strlen(beginning)) == 0;
    };
    if (is("Remote RPC server crashed")) {
        if constexpr (!std::is_same_v<MessagePointer, std::nullptr_t>) {
            overspill_answer_lost_command(*message);
            GGML_LOG_ERROR("an RPC server was lost\n");
            return;
        }
        throw std::runtime_error("it does not answer as a ggml-rpc-server does");
    }
    if (is("Failed to connect") || is("RPC handshake failed") || is("RPC transport") ||
        is("Failed to parse endpoint")) {
        throw std::runtime_error(text);
    }
    ggml_abort(file, line, "%s", text);
}

#ifndef _WIN32

#include "rpc_waiting.h"

// What upstream includes: the names below are not meant there.
#include <algorithm>
#include <array>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <future>
#include <optional>
#include <queue>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace std {  // where upstream looks for it

// In place of a promise and of its future: whether a command has been answered. Who waits asks whether to go on.
template <typename>
class overspill_answer {
  public:
    overspill_answer get_future() const { return *this; }
    overspill_answer share() const { return *this; }
    void set_value() const {
        {
            const lock_guard lock(state_->mutex);
            state_->is_there = true;
        }
        state_->changed.notify_all();
    }
    void wait_for(const thread & connection) const {
        constexpr auto interval = chrono::milliseconds(overspill_asking_interval_ms);
        constexpr int n_chances = 5;  // intervals in which a server that works may still answer, and is not lost then
        int n_told = 0;
        unique_lock lock(state_->mutex);
        while (!state_->changed.wait_for(lock, interval, [this] { return state_->is_there; })) {
            lock.unlock();
            if (overspill_told_to_stop() && ++n_told == n_chances) {
                overspill_lost_threads().add(connection.get_id());
            }
            lock.lock();
        }
        if (n_told >= n_chances) {
            overspill_lost_threads().remove(connection.get_id());
        }
    }

  private:
    struct State {
        std::mutex mutex;
        condition_variable changed;
        bool is_there = false;
    };
    shared_ptr<State> state_ = make_shared<State>();
};

}  // namespace std

#define promise overspill_answer
#define shared_future overspill_answer
// Of answers, without arguments; condition variables have theirs.
#define OVERSPILL_THIRD(first, second, third, ...) third
#define OVERSPILL_WAIT_FOR_ANSWER(...) wait_for(thread)
#define OVERSPILL_WAIT(lock, condition) wait(lock, condition)
#define wait(...) OVERSPILL_THIRD(__VA_ARGS__, OVERSPILL_WAIT, OVERSPILL_WAIT_FOR_ANSWER, )(__VA_ARGS__)

#endif

#undef GGML_ABORT
#define GGML_ABORT(...) overspill_rpc_failure(msg_ptr, __FILE__, __LINE__, __VA_ARGS__)
