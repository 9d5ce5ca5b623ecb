// A grammar is refused as an argument, or is followed for some tokens.

#include "sample/grammar.h"

#include "base/error.h"
#include "inputs.h"

#include <stdexcept>

namespace {

std::shared_ptr<overspill::Model> model;

}  // namespace

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    model = vocabulary();
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const std::string gbnf(reinterpret_cast<const char *>(data), size);
    try {
        overspill::Grammar grammar(model->loaded(), gbnf, {});
        int32_t next = 0;
        for (int step = 0; step < 8; ++step) {
            for (int32_t i = 0; i < model->n_vocab(); ++i) {
                const int32_t token = (next + i) % model->n_vocab();
                if (grammar.allows(token, {})) {
                    grammar.accept(token, {});
                    break;
                }
            }
            next += 97;
        }
    } catch (const std::invalid_argument &) {
    } catch (const overspill::Error &) {
    }
    return 0;
}
