/// The diffusion steps of one AR step, in as many calls of the head as they take.
#pragma once

#include "runner.hpp"

namespace nova {

/// Denoised tokens (B, K, d), on the host, after all steps of the tables; see nova_export/runtime/diffusion.py.
///
/// A head with a loop does any number in one call. An unrolled one does so many a call: each goes on from what
/// the one before left, and steps that change nothing fill up the last. inputs: as of a head with a loop.
Array denoise(Stages& stages, Arrays inputs);

} // namespace nova
