#include "base/assertions.h"

#include "base/activity.h"
#include "base/thread_start.h"
#include "base/waiting.h"

#include <assertions.h>  // in cmake/
#include <ggml.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <exception>
#include <new>
#include <utility>

namespace overspill {

namespace {

thread_local int n_guards = 0;
thread_local const std::shared_ptr<Team> * team = nullptr;
thread_local bool is_member = false;  // one of the threads that a team's own thread has started

void (*say_last_words)(const char *) = nullptr;
std::terminate_handler terminate_as_before = nullptr;

// `failure` is the whole story. Once: what is said may fail as well.
void end_process(const char * failure) {
    if (say_last_words != nullptr) {
        std::exchange(say_last_words, nullptr)(failure);
    }
}

// Some messages of llama.cpp end with a newline, or have several lines.
std::string what_failed(const char * message) {
    std::string text = std::string(Activity::current.load()) + ": " + message;
    while (text.back() == '\n') {
        text.pop_back();
    }
    std::replace(text.begin(), text.end(), '\n', ' ');
    return text;
}

std::string failed_while(const std::string & why) {
    return "llama.cpp failed while " + why;
}

void end_process_of(const char * message) {
    try {
        end_process(failed_while(what_failed(message)).c_str());
    } catch (const std::bad_alloc &) {
        end_process(message);
    }
}

#ifndef _WIN32

// Unwinds a member to where it has started. Not an exception of the standard library, which llama.cpp catches.
struct MemberEnds {};

[[noreturn]] void give_up(const std::string & why) {
    if ((*team)->end_others) {
        std::exchange((*team)->end_others, nullptr)();
    }
    throw AssertionFailed(failed_while(why));
}

void on_abort(const char * message) {
    if (std::uncaught_exceptions() == 0) {
        if (is_member) {
            (*team)->fail(message);
            throw MemberEnds{};
        }
        if (n_guards > 0 && team != nullptr) {
            (*team)->fail(message);
            give_up((*team)->why());
        }
        if (n_guards > 0) {
            throw AssertionFailed(failed_while(what_failed(message)));
        }
    }
    end_process_of(message);
}

struct Member {
    void * (*run)(void *);
    void * data;
    std::shared_ptr<Team> team;
    ThreadStart * start;
};

void * run_member(void * given) {
    const std::unique_ptr<Member> member(static_cast<Member *>(given));
    if (!member->start->take_memory()) {
        return nullptr;
    }
    team = &member->team;
    is_member = true;
    try {
        return member->run(member->data);
    } catch (const MemberEnds &) {
        return nullptr;
    }
}

int start_member(pthread_t * thread, const pthread_attr_t * attributes, void * (*run)(void *), void * data) {
    if (team == nullptr) {
        return pthread_create(thread, attributes, run, data);
    }
    ThreadStart start;
    auto member = std::make_unique<Member>(Member{run, data, *team, &start});
    const int status = pthread_create(thread, attributes, run_member, member.get());
    if (status != 0) {
        return status;
    }
    member.release();  // the thread's now
    if (start.wait()) {
        return 0;
    }
    pthread_join(*thread, nullptr);
    return EAGAIN;
}

#endif

// An assertion that was thrown where nothing may be thrown.
void on_terminate() {
    try {
        if (const std::exception_ptr thrown = std::current_exception()) {
            std::rethrow_exception(thrown);
        }
    } catch (const AssertionFailed & failure) {
        end_process(failure.what());
        std::abort();
#ifndef _WIN32
    } catch (const MemberEnds &) {
        end_process(failed_while((*team)->why()).c_str());
        std::abort();
#endif
    } catch (...) {
    }
    terminate_as_before();
}

}  // namespace

#ifdef _WIN32
void leave_if_failed() {}
#else
void leave_if_failed() {
    if (team == nullptr || !(*team)->failed()) {
        return;
    }
    if (is_member) {
        throw MemberEnds{};
    }
    give_up((*team)->why());
}
#endif

void while_waiting() {
    rest_while_waiting();
    leave_if_failed();
}

AssertionGuard::AssertionGuard() noexcept {
    ++n_guards;
    take_thread_memory();
}

AssertionGuard::~AssertionGuard() {
    --n_guards;
}

NoAssertionGuard::NoAssertionGuard() noexcept : n_guards_(std::exchange(n_guards, 0)) {}

NoAssertionGuard::~NoAssertionGuard() {
    n_guards = n_guards_;
}

Team::Scope::Scope(const std::shared_ptr<Team> & joined) noexcept : outer_(std::exchange(team, &joined)) {}

Team::Scope::~Scope() {
    team = outer_;
}

void Team::fail(const char * message) noexcept {
    State sound = State::sound;
    if (state_.compare_exchange_strong(sound, State::failing)) {
        try {
            why_ = what_failed(message);
        } catch (const std::bad_alloc &) {
            why_ = "?";  // needs no memory
        }
        state_.store(State::failed, std::memory_order_release);
    }
    while (!failed()) {  // whoever was first is about to be done
    }
}

void catch_assertions(void (*last_words)(const char *)) {
    say_last_words = last_words;
    terminate_as_before = std::set_terminate(on_terminate);
#ifdef _WIN32
    ggml_set_abort_callback(end_process_of);
#else
    overspill_set_assertion_hooks({while_waiting, start_member});
    ggml_set_abort_callback(on_abort);
#endif
}

}  // namespace overspill
