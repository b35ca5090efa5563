"""Vendor libraries whose kernels can replace Triton's: all that is known of each is declared once, in `LIBRARIES`.

Each library is adapted by the module of its name in this folder. Neither it nor torch is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from ..optional import import_optional

if TYPE_CHECKING:
    import torch

Vendor = Literal["flash_mla", "deep_gemm"]
"""Names of the libraries' modules: the keys of `LIBRARIES`."""
VendorKernels = Literal["none", Vendor, "all"]
"""Values of the setting `vendor_kernels`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """A vendor library: where to get it, what it must have, where it runs, and what it computes."""

    module: Vendor
    title: str
    source: str
    functions: tuple[str, ...]
    """Functions of the module that the adaptor calls."""
    ops: tuple[str, ...]
    """Operations that it implements in place of Triton."""
    purpose: str
    min_sm: int
    """Oldest compute capability, as in sm_90."""
    dtypes: tuple[str, ...]
    """Compute dtypes, by their names in torch."""
    not_invariant: str
    """The reason why a row's bits may depend on its batch; "" for batch-invariant kernels."""

    def load(self) -> ModuleType:
        """ValueError when the library is missing, cannot be imported or has an incompatible version."""
        module = import_optional(self.module, setting=self._setting, install=f"build it from {self.source}")
        if missing := self.missing_functions(module):
            raise ValueError(
                f"{self._setting}: the installed {self.module} has no {', '.join(missing)}; build a newer one"
            )
        return module

    def missing_functions(self, module: ModuleType) -> list[str]:
        """Names of `functions` that an installed version does not have."""
        return [name for name in self.functions if not hasattr(module, name)]

    def check_device(self, device: torch.device) -> None:
        """ValueError for a GPU that is older than `min_sm`."""
        import torch

        if device.type != "cuda":
            return
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor < self.min_sm:
            raise ValueError(
                f"{self._setting} needs sm_{self.min_sm} or newer, {device} is sm_{major}{minor}; "
                f"set vendor_kernels to none"
            )

    def check_dtype(self, dtype: torch.dtype) -> None:
        """ValueError for a compute dtype that it does not have."""
        name = str(dtype).removeprefix("torch.")
        if name not in self.dtypes:
            raise ValueError(
                f"{self._setting} computes in {' or '.join(self.dtypes)}, not in {name}; "
                f"set dtype to {self.dtypes[0]}, or vendor_kernels to none"
            )

    @property
    def _setting(self) -> str:
        return f"vendor_kernels {self.module}"


LIBRARIES: dict[Vendor, Library] = {
    library.module: library
    for library in (
        Library(
            module="flash_mla",
            title="FlashMLA",
            source="https://github.com/deepseek-ai/FlashMLA",
            functions=("flash_mla_sparse_fwd", "flash_mla_with_kvcache", "get_mla_metadata"),
            ops=("mla_attention",),
            purpose="attention over latents",
            min_sm=90,
            dtypes=("bfloat16",),
            not_invariant="its decode kernels split a context by what else is in the batch",
        ),
        Library(
            module="deep_gemm",
            title="DeepGEMM",
            source="https://github.com/deepseek-ai/DeepGEMM",
            functions=(
                "m_grouped_fp8_gemm_nt_contiguous",
                "get_mk_alignment_for_contiguous_layout",
                "fp8_paged_mqa_logits",
                "get_paged_mqa_logits_metadata",
                "get_num_sms",
            ),
            ops=("experts_mlp", "index_topk"),
            purpose="experts with FP8 weights and index scores over an FP8 cache",
            min_sm=90,
            dtypes=("bfloat16",),
            not_invariant="it chooses tiles by the batch size and has not been shown to be batch-invariant",
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProperties:
    """Properties of a model, its cache and its layout that decide whether a library has kernels for them."""

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    """Attention heads on a rank."""
    kv_lora_rank: int
    qk_rope_head_dim: int
    block_size: int
    """Tokens per KV cache block."""
    fp8_cache: bool
    index_shape: tuple[int, int] | None
    """(heads, dimension) of the indexer; None: attention to all positions."""
    hidden_size: int
    moe_intermediate_size: int
    block_fp8_weights: bool
    ue8m0_scales: bool
    """Scales of FP8 values are powers of two."""


def select_vendors(setting: VendorKernels) -> tuple[Vendor, ...]:
    """The libraries that a value of `vendor_kernels` asks for."""
    if setting == "none":
        return ()
    return tuple(LIBRARIES) if setting == "all" else (setting,)


def why_not_invariant(vendors: tuple[Vendor, ...]) -> str:
    """The reasons why these libraries are not batch-invariant; "" when all of them are."""
    reasons = {vendor: LIBRARIES[vendor].not_invariant for vendor in vendors}
    return "; ".join(f"{vendor}: {reason}" for vendor, reason in reasons.items() if reason)


def describe_libraries() -> str:
    """The libraries in one sentence, and in another those that are not batch-invariant."""
    uses = ", ".join(f"{library.title} for {library.purpose}" for library in LIBRARIES.values())
    relaxed = " and ".join(library.title for library in LIBRARIES.values() if library.not_invariant)
    return f"Installed libraries that replace Triton kernels on a GPU: {uses}. {relaxed} need invariance relaxed."
