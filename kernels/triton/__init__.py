"""The ops of shoal.kernels in Triton, for NVIDIA GPUs from sm_80 on: imported only when this backend is chosen."""
