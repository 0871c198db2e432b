// ISA-L, loaded at run time, so that the extension links nothing and one build runs wherever a libisal is found.
//
// Owns the library handle, which is never closed. Callers ask for functions by name and keep the pointers.
#pragma once

#include <string>

namespace ckptd::isal {

// Opens the library at `path` (a file, or a name for the dynamic linker). The first success wins; later calls do
// nothing. Throws std::runtime_error with the linker's message.
void load(const std::string& path);

// The address of function `name`. Throws std::runtime_error if no library was loaded or it lacks the function.
void* function(const char* name);

}  // namespace ckptd::isal
