// Included by force before ggml-cpu.c of llama.cpp, whose threads end the process when an assertion fails.
//
// Two places are led to cpp/base/assertions.cpp: threads of a pool start there, so that one that fails can end alone;
// and whoever spins until others are done asks there whether one of them has failed, since they would wait for ever,
// and rests where another program wants its core.
// cmake/assertions.c has the two functions. CMakeLists.txt checks that upstream still has the two places.
#pragma once

#ifndef _WIN32

#include <pthread.h>

#ifdef __cplusplus
extern "C" {
#endif

struct overspill_assertion_hooks {
    void (*while_waiting)(void);
    int (*start_thread)(pthread_t * thread, const pthread_attr_t * attributes, void * (*run)(void *), void * data);
};

// Before others run threads. Without it, both places do what they did.
__attribute__((visibility("default"))) void overspill_set_assertion_hooks(struct overspill_assertion_hooks hooks);
__attribute__((visibility("default"))) void overspill_while_waiting(void);
__attribute__((visibility("default"))) int overspill_start_thread(pthread_t * thread, const pthread_attr_t * attributes,
                                                                  void * (*run)(void *), void * data);

#ifdef __cplusplus
}
#else
#define pthread_create(thread, attributes, run, data) overspill_start_thread(thread, attributes, run, data)
// Its definition has the argument "void", its calls have none.
#define ggml_thread_cpu_relax(...) OVERSPILL_RELAX_##__VA_ARGS__()
#define OVERSPILL_RELAX_void() overspill_relax(void)
#define OVERSPILL_RELAX_() (overspill_while_waiting(), overspill_relax())
#endif

#endif
