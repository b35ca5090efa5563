"""The compiled kernels give the same bits on every instruction set: this machine's own against plainer ones."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shoal.kernels.attention import PagedLayout
from shoal.kernels.quant import BlockFP8Weight, quantize_block_fp8
from tests.support.ops import CPU_OPS

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
from shoal.kernels import build
build.FLAGS = (*build.FLAGS, *sys.argv[1:])
from tests.kernels.test_portable import digest
print(digest())
"""


def digest() -> str:
    """SHA-256 over what the kernels make of some numbers, very large and very small ones among them."""
    hashed = hashlib.sha256()
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):

        def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            exponents = torch.randint(-60, 4, shape, generator=generator)
            return torch.ldexp(torch.randn(shape, generator=generator), exponents).to(dtype)

        layout = PagedLayout(
            block_tables=torch.tensor([[3, 1, 0, 2]]).int(),
            cu_seqlens_q=torch.tensor([0, 70]).int(),
            positions=torch.arange(57, 127),
            block_size=32,
        )
        kv_cache = normal(128, 48)
        fp8 = BlockFP8Weight.of_rows(*quantize_block_fp8(normal(37, 150, dtype=torch.float32)))
        codes, scales = CPU_OPS.quantize_rows_fp8(normal(6, 300))
        outputs = [
            codes.view(torch.uint8),
            CPU_OPS.dequantize_rows_fp8(codes, scales, dtype),
            CPU_OPS.linear(normal(21, 77), CPU_OPS.pack_weight(normal(50, 77))),
            CPU_OPS.linear(normal(5, 150), CPU_OPS.pack_weight(fp8, dtype=dtype)),
            CPU_OPS.swiglu(normal(9, 66)),
            CPU_OPS.experts_mlp(
                normal(9, 40),
                torch.tensor([2, 0, 7]),
                CPU_OPS.pack_weight(normal(3, 44, 40)),
                CPU_OPS.pack_weight(normal(3, 40, 22)),
            ),
            CPU_OPS.rms_norm(normal(3, 100), torch.ones(100), 1e-6),
            CPU_OPS.mla_attention(normal(70, 3, 40), normal(70, 3, 8), kv_cache, layout, 0.3),
            CPU_OPS.mha_attention(
                normal(70, 3, 20),
                kv_cache,
                layout,
                CPU_OPS.pack_weight(normal(3, 12, 40)),
                CPU_OPS.pack_weight(normal(3, 20, 40)),
                0.3,
            ),
            CPU_OPS.index_scores(normal(5, 6, 24), normal(5, 6, dtype=torch.float32), normal(40, 24)),
        ]
        for output in outputs:
            assert not output.isnan().any()
            hashed.update(output.contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compares x86 instruction sets")
@pytest.mark.parametrize("flags", [["-mno-avx512bf16"], ["-march=x86-64-v3"]], ids=["AVX-512", "AVX2"])
def test_every_instruction_set_gives_the_same_bits(flags: list[str], tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"SHOAL_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{root / '.src'}:{root}"}
    command = [sys.executable, "-c", PROGRAM, *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == digest()
