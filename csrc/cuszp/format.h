// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// Constants of the record format (docs/reference/format.md), shared by the C++ and the CUDA codec.
#pragma once

#include <stdint.h>

enum : uint32_t {
  KVZ_FORMAT_VERSION = 1,
  KVZ_GROUP_VALUES = 16,      // values of one group
  KVZ_ALIGNMENT = 16,         // bytes; segments start at multiples of it
  KVZ_CONSTANT_BYTES = 4,     // size of a `constant` segment
  KVZ_NIBBLE_RAW = 15,        // class of a raw group, nibble classes
  KVZ_BYTE_RAW = 63,          // class of a raw group, byte classes
  KVZ_BYTE_FIRST_APART = 64,  // bit 6 of a byte class: the first value is kept apart
};

enum kvz_dtype : uint8_t {
  KVZ_BF16 = 0,
  KVZ_FP16 = 1,
  KVZ_FP32 = 2,
  KVZ_OPAQUE = 3,
};

enum kvz_coding : uint8_t {
  KVZ_RAW = 0,
  KVZ_CONSTANT = 1,
  KVZ_FIXED = 2,
  KVZ_PLAIN = 3,
  KVZ_OUTLIER = 4,
  KVZ_LOSSLESS = 5,
};

enum kvz_bound_kind : uint8_t {
  KVZ_BOUND_LOSSLESS = 0,
  KVZ_BOUND_ABSOLUTE = 1,
  KVZ_BOUND_RELATIVE = 2,  // to the page's range, max - min of its finite values
};

enum kvz_reason : uint8_t {
  KVZ_AS_ASKED = 0,
  KVZ_BOUND_TOO_FINE = 1,
  KVZ_LOSSLESS_SMALLER = 2,
  KVZ_INCOMPRESSIBLE = 3,
  KVZ_OPAQUE_DTYPE = 4,
  KVZ_ENCODER_FAILED = 5,
  KVZ_CODEC_UNAVAILABLE = 6,
};
