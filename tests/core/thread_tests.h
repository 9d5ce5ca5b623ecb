// The threads that compute on the CPU, and how many of them decode.
#pragma once

void test_thread_pool();
void test_thread_count();
void test_resting();
