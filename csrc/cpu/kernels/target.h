// QK_BEGIN_TARGET("avx2,fma") ... QK_END_TARGET: the functions in between are compiled for these features.
//
// QK_EMULATED: <immintrin.h> is a stand-in that computes what this CPU lacks (tests/native/emulation), so the compiler
// must not emit it by itself.
#pragma once

#define QK_PRAGMA(text) _Pragma(#text)

#if defined(QK_EMULATED)
#define QK_BEGIN_TARGET(features)
#define QK_END_TARGET
#elif defined(__clang__)
#define QK_BEGIN_TARGET(features) \
  QK_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define QK_END_TARGET QK_PRAGMA(clang attribute pop)
#else
#define QK_BEGIN_TARGET(features) QK_PRAGMA(GCC push_options) QK_PRAGMA(GCC target(features))
#define QK_END_TARGET QK_PRAGMA(GCC pop_options)
#endif
