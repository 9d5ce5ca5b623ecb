// What Python code decides for a stream: the token, or which may come next.
#pragma once

#include "generate/generation_options.h"
#include "sample/constraint.h"

#include <pybind11/pybind11.h>

#include <memory>

namespace overspill {

// Of a callable that is given the logits and all tokens so far, and returns a token's id or None; None stands for none.
Chooser chooser_of(const pybind11::object & callable);

// Of an object whose method allowed() gives a mask, and whose method accept(token) is told what has come.
std::shared_ptr<Constraint> python_constraint(pybind11::object mask);

}  // namespace overspill
