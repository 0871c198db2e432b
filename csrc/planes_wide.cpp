// Compiled for AVX-512 with VBMI where the compiler knows it (CMakeLists.txt): nothing here may run elsewhere.
#include "planes.hpp"

namespace ckptd::byteplanes {

#if defined(__AVX512VBMI__) && defined(__AVX512BW__)

namespace {
constexpr Mover mover{split_piece<64>, join_piece<64>};
}

const Mover* const wide_mover = &mover;

#else

const Mover* const wide_mover = nullptr;

#endif

}  // namespace ckptd::byteplanes
