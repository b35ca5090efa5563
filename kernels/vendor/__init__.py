"""Kernels of libraries in place of Triton's, one module for each library; none is imported before it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from ..optional import import_optional
from ..registry import Vendor


@dataclass(frozen=True, slots=True)
class Library:
    """What must be there."""

    module: Vendor
    source: str
    functions: tuple[str, ...]
    """Functions of the module that the adaptor calls."""

    def load(self) -> ModuleType:
        """ValueError when the library is missing, cannot be imported or is of another time."""
        setting = f"vendor_kernels {self.module}"
        module = import_optional(self.module, setting=setting, install=f"build it from {self.source}")
        if missing := [name for name in self.functions if not hasattr(module, name)]:
            raise ValueError(f"{setting}: the installed {self.module} has no {', '.join(missing)}; build a newer one")
        return module


LIBRARIES: dict[Vendor, Library] = {
    "flash_mla": Library(
        "flash_mla",
        "https://github.com/deepseek-ai/FlashMLA",
        ("flash_mla_sparse_fwd", "flash_mla_with_kvcache", "get_mla_metadata"),
    ),
    "deep_gemm": Library(
        "deep_gemm",
        "https://github.com/deepseek-ai/DeepGEMM",
        (
            "m_grouped_fp8_gemm_nt_contiguous",
            "get_mk_alignment_for_contiguous_layout",
            "fp8_paged_mqa_logits",
            "get_paged_mqa_logits_metadata",
            "get_num_sms",
        ),
    ),
}
