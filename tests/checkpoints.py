"""Small random checkpoints, under one name for all tests."""

from __future__ import annotations

from shoal.runtime.random_checkpoint import YARN, make_checkpoint, random_tensor, tensor_shapes, tiny_config

__all__ = ["YARN", "make_checkpoint", "random_tensor", "tensor_shapes", "tiny_config"]
