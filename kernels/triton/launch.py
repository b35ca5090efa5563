"""Shared by all Triton kernels: interpreter flag, device properties, dot products and conversions."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run on CPU tensors, one program at a time (TRITON_INTERPRET=1 before the first import)."""


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _num_sms(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def num_sms(device: torch.device) -> int:
    """Multiprocessors of the device; 1 under the interpreter."""
    return _num_sms(device.index or 0) if device.type == "cuda" else 1


@functools.cache
def _shared_memory(index: int) -> int:
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory available to one program; an H100's under the interpreter."""
    return _shared_memory(device.index or 0) if device.type == "cuda" else 232448


def has_fp8(device: torch.device) -> bool:
    """Whether the device has float8_e4m3fn GEMMs and conversions: sm_89 and newer, not the interpreter.

    Without them kernels take FP8 tensors as uint8 and use `decode_e4m3` and `encode_e4m3`.
    """
    return device.type == "cuda" and _capability(device.index or 0) >= (8, 9)


@triton.jit
def dot(a, b, acc):
    """acc + a b in fp32. fp32 operands are not rounded to TF32."""
    if INTERPRET:  # its bfloat16 dots are wrong
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 -> `dtype`, to nearest, ties to even."""
    if INTERPRET and dtype == tl.bfloat16:  # it truncates
        bits = x.to(tl.uint32, bitcast=True)
        high = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return high.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def decode_e4m3(bits):
    """uint8 codes of float8_e4m3fn -> float16, exact."""
    magnitude = (bits & 0x7F).to(tl.uint16)
    half = (((bits & 0x80).to(tl.uint16) << 8) | (magnitude << 7)).to(tl.float16, bitcast=True)
    return tl.where(magnitude == 0x7F, float("nan"), half * 256.0).to(tl.float16)


@triton.jit
def encode_e4m3(x):
    """float32 in [-448, 448] or NaN -> uint8 codes of float8_e4m3fn, to nearest, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Below 2^-6 the codes are multiples of 2^-9: adding 2^14 leaves that multiple in the last bits, rounded by the sum.
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1) - 0x3C000000) >> 20
    code = tl.where(magnitude < 0x3C800000, small, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (((bits >> 24) & 0x80) | code).to(tl.uint8)
