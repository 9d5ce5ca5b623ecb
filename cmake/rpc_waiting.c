#include "rpc_waiting.h"

#ifndef _WIN32

static int (*answer_told_to_stop)(void) = 0;

void overspill_answer_told_to_stop(int (*answer)(void)) {
    answer_told_to_stop = answer;
}

int overspill_told_to_stop(void) {
    return answer_told_to_stop != 0 && answer_told_to_stop();
}

#endif
