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
  KVZ_RICE = 6,
  KVZ_LOSSLESS_RICE = 7,
};

enum : uint32_t {
  KVZ_STRIP_GROUPS = 64,       // groups of a row whose quotients are one stream
  KVZ_RICE_PLANES = 3,         // most planes of Rice parameters
  KVZ_RICE_BASE_PLANES = 4,    // most planes of exponent bases
  KVZ_RICE_MOST_EXPONENT = 5,  // largest Rice parameter of `lossless_rice`
};

// Bits 4 and 5 of a quantised segment's coding: what its bound depends on.
enum kvz_steps : uint8_t {
  KVZ_STEPS_PAGE = 0x00,     // one bound for the page
  KVZ_STEPS_TOKEN = 0x10,    // one for each token and head: a scale byte each at the start of the segment
  KVZ_STEPS_CHANNEL = 0x20,  // one for each channel: a table that the record names
  KVZ_STEPS_MASK = 0x30,
  KVZ_CODING_MASK = 0x0f,
};

enum : uint32_t {
  KVZ_SCALE_ZERO = 255,  // scale of a vector of zeros
  KVZ_SCALE_LARGEST = 254,
  KVZ_SCALE_SHIFT = 19,  // bits of a float32 below the 5 significant bits that a token's bound keeps
};

enum kvz_bound_kind : uint8_t {
  KVZ_BOUND_LOSSLESS = 0,
  KVZ_BOUND_ABSOLUTE = 1,
  KVZ_BOUND_RELATIVE = 2,       // to the page's range, max - min of its finite values
  KVZ_BOUND_TOKEN_RMS = 3,      // to the root mean square of each token's vector of a head
  KVZ_BOUND_CHANNEL_TABLE = 4,  // absolute, one for each channel
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
