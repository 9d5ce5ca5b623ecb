// Makes an assertion of llama.cpp fail at any place of a decode. To be preloaded (LD_PRELOAD), so that llama.cpp calls
// these functions in place of its own; each counts the call and passes it on. Linux alone.
#include <ggml-backend.h>
#include <ggml-cpu.h>

#include <dlfcn.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

namespace {

// Who makes a call: the thread that was asked to decode, or one that computes for it.
enum Who { caller, worker, n_who };

std::atomic<int64_t> calls_left[n_who] = {{-1}, {-1}};  // until one fails; negative: none will
std::atomic<int64_t> n_calls[n_who];
std::atomic<int64_t> n_failed;
std::atomic<int> place{0};
thread_local bool computes = false;

void fail(Who who) {
    GGML_ABORT("made to fail on a %s\n", who == caller ? "caller" : "worker");
}

// Where an exception cannot pass, or is on its way already.
void fail_without_return(Who who) noexcept {
    fail(who);
}

struct FailsWhenDestroyed {
    Who who;
    ~FailsWhenDestroyed() { fail(who); }
};

void count(Who who) {
    ++n_calls[who];
    if (calls_left[who].load() >= 0 && calls_left[who]-- == 0) {
        ++n_failed;
        switch (place.load()) {
            case 0: fail(who); break;
            case 1: fail_without_return(who); break;
            default: {
                const FailsWhenDestroyed last{who};
                throw std::runtime_error("on its way");
            }
        }
    }
}

template <typename Function>
Function original(const char * library, const char * name) {
    void * handle = dlopen(library, RTLD_NOLOAD | RTLD_LAZY);
    void * found = handle == nullptr ? nullptr : dlsym(handle, name);
    if (found == nullptr) {
        std::abort();
    }
    return reinterpret_cast<Function>(found);
}

}  // namespace

extern "C" {

// The next call but `n` of that kind fails; a negative number: none.
void fail_after(int who, int64_t n) {
    calls_left[who] = n;
}

// Where the assertion fails then. 0: where it can be thrown; 1: in a function that may not throw; 2: in a destructor,
// while an exception is on its way.
void fail_in(int where) {
    place = where;
}

// An assertion that fails on a thread of nobody's.
void fail_here() {
    fail(caller);
}

int64_t calls_made(int who) {
    return n_calls[who];
}

int64_t failures() {
    return n_failed;
}

// A graph on the CPU, whose caller computes as well.
enum ggml_status ggml_graph_compute(struct ggml_cgraph * graph, struct ggml_cplan * plan) {
    static const auto real = original<decltype(&ggml_graph_compute)>("libggml-cpu.so", "ggml_graph_compute");
    struct Computing {
        Computing() { computes = true; }
        ~Computing() { computes = false; }
    } const computing;
    return real(graph, plan);
}

// After each operation of a graph, and within some.
void ggml_barrier(struct ggml_threadpool * threads) {
    static const auto real = original<decltype(&ggml_barrier)>("libggml-cpu.so", "ggml_barrier");
    count(computes ? caller : worker);
    real(threads);
}

// Whoever waits for the others gives its core to them: there may be more threads than cores.
void overspill_while_waiting() {
    static const auto real = original<void (*)()>("libggml-base.so", "overspill_while_waiting");
    real();
    sched_yield();
}

// While a graph is built.
struct ggml_tensor * ggml_mul_mat(struct ggml_context * context, struct ggml_tensor * a, struct ggml_tensor * b) {
    static const auto real = original<decltype(&ggml_mul_mat)>("libggml-base.so", "ggml_mul_mat");
    count(caller);
    return real(context, a, b);
}

// The inputs of a graph.
void ggml_backend_tensor_set(struct ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    static const auto real = original<decltype(&ggml_backend_tensor_set)>("libggml-base.so", "ggml_backend_tensor_set");
    count(caller);
    real(tensor, data, offset, size);
}
}
