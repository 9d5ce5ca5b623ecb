// The products of cpp/product and what is computed with them, against sums in double precision and llama.cpp.
#pragma once

void test_products();
void test_activations();
void test_feed_forwards();
