// Compiled into ggml-base, which every variant of the CPU backend shares: see assertions.h.
#include "assertions.h"

#ifndef _WIN32

#undef pthread_create  // here it is meant

static struct overspill_assertion_hooks hooks;

void overspill_set_assertion_hooks(struct overspill_assertion_hooks given) {
    hooks = given;
}

void overspill_while_waiting(void) {
    if (hooks.while_waiting) {
        hooks.while_waiting();
    }
}

int overspill_start_thread(pthread_t * thread, const pthread_attr_t * attributes, void * (*run)(void *), void * data) {
    return hooks.start_thread ? hooks.start_thread(thread, attributes, run, data)
                              : pthread_create(thread, attributes, run, data);
}

#endif
